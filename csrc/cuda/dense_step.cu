// The step of a dense bucket: v itself is summed over all ranks, between these two kernels. A block
// owns one work tile.
#include "block.cuh"
#include "launch.h"
#include "rule_tile.cuh"

namespace gmc::cuda {
namespace {

struct AccumulateArgs {
  RuleArgs rule;
  const float* aggregate;  // [numel]; nullptr: there is none
  float* total;
  int64_t rank, ranks;
};
static_assert(sizeof(AccumulateArgs) <= kParameterLimit, "kernel parameters");

struct ApplyDenseArgs {
  float* memory;
  float* total;
  int64_t numel;
  float factor;  // 1 / ranks
  MoveArgs move;
};
static_assert(sizeof(ApplyDenseArgs) <= kParameterLimit, "kernel parameters");

// *counter += x, a whole number, up to kLargestCount.
__device__ void add_count(float* counter, uint32_t x) {
  auto* const bits = reinterpret_cast<uint32_t*>(counter);
  uint32_t seen = 0, expected;  // the launcher has set the counter to zero
  do {
    expected = seen;
    const uint32_t sum = min(static_cast<uint32_t>(bits_float(expected)) + x, kLargestCount);
    seen = atomicCAS(bits, expected, float_bits(static_cast<float>(sum)));
  } while (seen != expected);
}

struct AccumulateShared {
  alignas(16) float stage[kWorkTile];
};

template <class Rule>
__global__ void __launch_bounds__(kThreads, Rule::kBlocks)
    accumulate_kernel(const __grid_constant__ AccumulateArgs args) {
  static __shared__ AccumulateShared shared;
  const RuleTile tile(args.rule, WorkTile(blockIdx.x, args.rule.numel), shared.stage);
  const auto count = [&](uint32_t n) {
    n = __reduce_add_sync(kAllLanes, n);
    if (lane_id() == 0 && n != 0) add_count(args.total + args.rule.numel + args.rank, n);
  };
  float v[kPerThread];
  Rule::make(tile, args.aggregate, v, [] {}, count);
  store_floats(args.rule.memory, tile, v);
  store_floats(args.total, tile, v);
  if (blockIdx.x == 0 && warp_id() == 0)
    count(threadIdx.x == 0 && args.rule.found_inf.load() != 0.0f);
}

__global__ void __launch_bounds__(kThreads)
    apply_dense_kernel(const __grid_constant__ ApplyDenseArgs args) {
  const WorkTile tile(blockIdx.x, args.numel);
  float a[kPerThread], w[kPerThread];
  const MoveArgs& move = args.move;
  if (blockIdx.x == 0 && threadIdx.x == 0) move.skip.leave_behind(0);
  if (move.skip.skipped()) {
    zero(a);
    store_floats(args.total, tile, a);
    return;
  }
  const float lr = move.lr.load();
  const TileSegments shared(move.params.begin(move.own), move.params.count, args.numel, tile);
  if (shared.whole && with_quads(*shared.first, tile, [&](auto format, auto* words) {
        using Format = decltype(format);
        load_floats(args.total, tile, a);
        load_quads<Format>(words, w);
#pragma unroll
        for (int e = 0; e < kPerThread; ++e) {
          a[e] = multiply(a[e], args.factor);
          w[e] = moved(w[e], lr, a[e]);
        }
        store_quads<Format>(words, w);
        store_floats(args.total, tile, a);
        zero(a);
        store_floats(args.memory, tile, a);
      }))
    return;
  const int candidates = shared.count(tile);
  for (uint32_t place = threadIdx.x; place < tile.size; place += kThreads) {
    const uint32_t i = tile.begin + place;
    const TableSegment segment = shared.first[find_segment(shared.first, candidates, i)];
    const int64_t at = i - segment.begin;
    const float mean = multiply(args.total[i], args.factor);
    const float weight = load_value(segment.data, segment.dtype, at);
    store_value(segment.data, segment.dtype, at, moved(weight, lr, mean));
    args.total[i] = mean;
    args.memory[i] = 0.0f;
  }
}

}  // namespace

void run(const AccumulateCall& call, const Stream& stream) {
  const AccumulateArgs args{RuleArgs(call.rule, stream), call.aggregate, call.total, call.rank,
                            call.ranks};
  const int64_t numel = args.rule.numel;
  check(cudaMemsetAsync(args.total + numel, 0, 4 * args.ranks, stream.stream));
  with_rule(args.rule, [&](auto rule) {
    launch(accumulate_kernel<decltype(rule)>, work_tile_count(numel), kThreads, stream, args);
  });
}

void run(const ApplyDenseCall& call, const Stream& stream) {
  const ApplyDenseArgs args{call.memory, call.total, call.numel, mean_factor(call.ranks),
                            MoveArgs(call.move, stream)};
  launch(apply_dense_kernel, work_tile_count(args.numel), kThreads, stream, args);
}

}  // namespace gmc::cuda
