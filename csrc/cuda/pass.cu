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
  alignas(16) RunWords run;
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
  float v[kPerThread];
  const auto loaded = [&] {
    if (args.aggregate.data)
      shared.run.load(args.aggregate, tile.begin / static_cast<uint32_t>(kAggregateRun),
                      threadIdx.x);
    wait_for_previous();
    if (threadIdx.x == 0) {
      shared.guess = control->guess.key;
      shared.scale = control->scale;
    }
  };
  const auto count = [&](uint32_t n) {
    add_to_counter(&args.workspaces.first.control->nonfinite, n);
  };
  Rule::make(tile, SparseMomentum{args.aggregate, shared.run}, v, loaded, count);
  const uint32_t guess = shared.guess;
  const uint32_t mask = reaching(tile, v, guess);
  const Compaction compaction = reserve(tile, mask, &control->found, workspace, &shared.compact);
  if (compaction.stored)
    store_candidates(own, mask, guess, compaction, workspace, workspace.pass_bins, tile.stage, v,
                     [&](float value) {
                       return with_wire_type(args.ranges.full.wire, [&](auto format) {
                         return left_behind<decltype(format)>(value, shared.scale);
                       });
                     });
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
