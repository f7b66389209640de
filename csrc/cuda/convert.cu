// sparsify and densify convert between an aggregate and a dense tensor. A block owns one wire tile.
#include "aggregate.cuh"
#include "block.cuh"
#include "launch.h"
#include "shared/calls.h"

namespace gmc::cuda {
namespace {

struct SparsifyShared {
  uint32_t warp_sums[2][kWarps];
};

// Tile t's entries begin at 65,536 t.
__global__ void __launch_bounds__(kThreads)
    sparsify_kernel(const float* dense, int64_t numel, uint8_t* aggregate) {
  static __shared__ SparsifyShared shared;
  const int64_t begin = blockIdx.x * kTile;
  const int64_t end = begin + kTile < numel ? begin + kTile : numel;
  const AggregateView view(aggregate, AggregateLayout(numel, numel));
  uint32_t count = 0;
  int turn = 0;  // two sets of sums, so that one barrier a round is enough
  for (int64_t first = begin; first < end; first += kThreads, turn ^= 1) {
    const int64_t i = first + threadIdx.x;
    const float value = i < end ? dense[i] : 0.0f;
    if (threadIdx.x == 0 && first % kAggregateRun == 0)
      view.runs[first / kAggregateRun] = static_cast<uint16_t>(count);
    uint32_t total;
    const uint32_t position =
        count + block_exclusive_sum<kThreads>(static_cast<uint32_t>(value != 0.0f), &total,
                                              shared.warp_sums[turn]);
    if (value != 0.0f) {
      view.indices[begin + position] = static_cast<uint16_t>(i - begin);
      view.values[begin + position] = value;
    }
    count += total;
  }
  if (threadIdx.x != 0) return;
  view.starts[blockIdx.x] = static_cast<uint32_t>(begin);
  view.counts[blockIdx.x] = count;
  for (int64_t run = (end + kAggregateRun - 1) / kAggregateRun; run < (blockIdx.x + 1) * kTileRuns;
       ++run)
    view.runs[run] = static_cast<uint16_t>(count);
  if (blockIdx.x == 0)
    *view.header = {kAggregateMagic, 0, static_cast<uint32_t>(numel), static_cast<uint32_t>(numel)};
}

__global__ void __launch_bounds__(kThreads)
    densify_kernel(const __grid_constant__ AggregateSource aggregate, float* dense) {
  const int64_t begin = blockIdx.x * kTile;
  const int64_t end = min(begin + kTile, int64_t{aggregate.numel});
  const AggregateView<const uint8_t> view = aggregate.view();
  const EntryRange entries = TileWords::load(aggregate, blockIdx.x).entries(aggregate);
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) dense[i] = 0.0f;
  __syncthreads();
  for (uint32_t entry = threadIdx.x; entry < entries.count; entry += kThreads) {
    const int64_t i = begin + view.indices[entries.begin + entry];
    if (i < end) dense[i] = view.values[entries.begin + entry];
  }
}

}  // namespace

void run(const SparsifyCall& call, const Stream& stream) {
  launch(sparsify_kernel, tile_count(call.numel), kThreads, stream, call.dense, call.numel,
         call.aggregate);
}

void run(const DensifyCall& call, const Stream& stream) {
  launch(densify_kernel, tile_count(call.numel), kThreads, stream,
         AggregateSource(call.aggregate, call.numel), call.dense);
}

}  // namespace gmc::cuda
