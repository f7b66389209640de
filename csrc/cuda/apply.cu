// apply: w -= lr * a on the entries of an aggregate. It touches the 32-byte sectors that hold them.
#include "kernels.h"
#include "launch.h"
#include "rule.h"

namespace gmc::cuda {
namespace {

constexpr int kBatch = 4;  // entries of a thread whose parameters are on their way at once

// A block owns one wire tile.
__global__ void __launch_bounds__(kThreads) apply_kernel(const __grid_constant__ ApplyArgs args) {
  if (args.move.skipped()) {
    if (blockIdx.x == 0 && threadIdx.x == 0) args.move.count();
    return;
  }
  const int64_t begin = blockIdx.x * kTile;
  const AggregateEntries entries = aggregate_entries(args.aggregate, args.numel, blockIdx.x);
  if (entries.count == 0) return;
  const float lr = args.move.lr.load();
  const TableSegment* segments = args.move.params.begin(args.move.own);
  const int total = args.move.params.count;
  // The tensors that this tile meets.
  const int64_t last = (begin + kTile < args.numel ? begin + kTile : args.numel) - 1;
  const int first = find_segment(segments, total, static_cast<uint32_t>(begin));
  const int count = find_segment(segments, total, static_cast<uint32_t>(last)) - first + 1;

  for (uint32_t at = threadIdx.x; at < entries.count; at += kBatch * kThreads) {
    float weight[kBatch], value[kBatch];
    TableSegment segment[kBatch];
    int64_t place[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const uint32_t entry = at + j * kThreads;
      segment[j].data = nullptr;
      if (entry >= entries.count) continue;
      const int64_t i = begin + entries.indices[entry];
      if (i > last) continue;
      segment[j] =
          segments[first + find_segment(segments + first, count, static_cast<uint32_t>(i))];
      place[j] = i - segment[j].begin;
      value[j] = entries.values[entry];
      weight[j] = load_value(segment[j].data, segment[j].dtype, place[j]);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j)
      if (segment[j].data)
        store_value(segment[j].data, segment[j].dtype, place[j], moved(weight[j], lr, value[j]));
  }
}

}  // namespace

cudaError_t apply_launch(const ApplyArgs& args, cudaStream_t stream) {
  return launch(apply_kernel, tile_count(args.numel), kThreads, stream, args);
}

}  // namespace gmc::cuda
