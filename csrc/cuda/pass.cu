// The pass computes v of a whole bucket, once. It reads memory, the gradient and what else the rule
// needs, writes memory, counts what is not finite and puts candidates aside. Of these memory keeps
// only what will stay there once they are sent.
#include "candidates.cuh"
#include "compress.h"
#include "launch.h"
#include "rule_tile.cuh"

namespace gmc::cuda {
namespace {

struct PassShared {
  uint32_t guess;  // shared, because no thread has registers to spare
  int scale;
  CompactShared compact;
  alignas(16) float stage[kWorkTile];
};

template <class Rule>
__global__ void __launch_bounds__(kThreads, Rule::kBlocks)
    pass_kernel(const __grid_constant__ CompressArgs args) {
  static __shared__ PassShared shared;
  start_next();
  const OwnRange range(args);
  if (blockIdx.x * static_cast<uint32_t>(kWorkTile) >= range.numel) return;  // the last is shorter
  const WorkTile own(blockIdx.x, range.numel);
  const RuleTile tile(args.rule, own.from(range.begin), shared.stage);
  const Workspace& workspace = range.workspace;
  Control* const control = workspace.control;
  uint32_t nonfinite = 0;
  float v[kPerThread];
  Rule::make(tile, args.aggregate, v, &nonfinite, [&] {
    wait_for_previous();
    if (threadIdx.x == 0) {
      shared.guess = control->guess.key;
      shared.scale = control->scale;
    }
  });
  __syncthreads();
  const uint32_t guess = shared.guess;
  add_to_counter(&args.workspaces.first.control->nonfinite, nonfinite);
  const uint32_t mask = reaching(tile, v, guess);
  const Compaction compaction = reserve(tile, mask, &control->found, workspace, &shared.compact);
  if (compaction.stored) {
    store_candidates(own, mask, v, guess, compaction, workspace, workspace.pass_bins);
    take_out(tile, mask, args.ranges.full.wire, shared.scale, tile.stage, v);
  }
  store_floats(args.rule.memory, tile, v);
}

}  // namespace

void pass(const CompressArgs& args, const Stream& stream) {
  with_rule(args.rule, [&](auto rule) {
    launch_early(pass_kernel<decltype(rule)>,
                 {work_tile_count(args.ranges.width()), args.ranges.count}, kThreads, stream, args);
  });
}

}  // namespace gmc::cuda
