// The repair. When the guess gave too few candidates or too many, or the k-th largest lies beyond
// the bins, the candidates are given back, a better guess comes from a coarse histogram of all of
// memory, and memory is compacted again. Both kernels end at once when the pass did well.
#include "candidates.cuh"
#include "compress.h"
#include "launch.h"

namespace gmc::cuda {
namespace {

__device__ __forceinline__ Outcome outcome_of_guess(const OwnSelection& args) {
  const Control& control = *args.workspace.control;
  if (control.found < args.shape.k) return control.guess.key == 1 ? kFewValues : kUseless;
  const bool beyond = args.workspace.pass_bins[kBins - 1] >= args.shape.k;  // it has no upper end
  return beyond || control.found > args.workspace.capacity ? kUseless : kUseful;
}

// Puts v back into memory where the pass took candidates of this tile out.
__device__ __forceinline__ void give_back(const OwnSelection& args, const WorkTile& tile) {
  const uint2 place = args.workspace.tiles[tile.number];
  if (place.x + place.y > args.workspace.capacity)
    return;  // there was no room: they stayed in memory
  for (uint32_t i = threadIdx.x; i < place.y; i += kThreads) {
    const uint2 candidate = args.workspace.candidates[place.x + i];
    args.memory[candidate.x] = bits_float(candidate.y);
  }
}

__global__ void __launch_bounds__(kThreads) coarse_kernel(const __grid_constant__ SelectArgs all) {
  static __shared__ uint32_t bins[kCoarseBins];
  start_next();
  wait_for_previous();
  const OwnSelection args(all);
  const Outcome outcome = outcome_of_guess(args);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    Control* const control = args.workspace.control;
    control->outcome = outcome;
    control->from_memory = false;
    control->base = control->guess.key;
  }
  if (outcome != kUseless) return;
  clear_bins<kCoarseBins>(bins);
  __syncthreads();
  for (uint32_t number = blockIdx.x; number < work_tile_count(args.shape.numel);
       number += gridDim.x) {
    const WorkTile tile(number, args.shape.numel);
    give_back(args, tile);
    __syncthreads();
    float x[kPerThread];
    load_floats(args.memory, tile, x);
#pragma unroll
    for (int e = 0; e < kPerThread; ++e)
      if (tile.place(e) < tile.size) atomicAdd(&bins[magnitude_key(x[e]) >> kCoarseShift], 1u);
  }
  __syncthreads();
  flush_bins<kCoarseBins>(bins, args.workspace.coarse_bins);
}

struct RepairShared {
  FindShared<> find;
  CompactShared compact;
  uint32_t bins[kBins];
  alignas(16) float stage[kWorkTile];
};

__global__ void __launch_bounds__(kThreads)
    recompact_kernel(const __grid_constant__ SelectArgs all) {
  static __shared__ RepairShared shared;
  const OwnSelection args(all);
  const Workspace& workspace = args.workspace;
  start_next();
  wait_for_previous();
  if (workspace.control->outcome != kUseless) return;
  clear_bins<kBins>(shared.bins);
  const FoundBin coarse = find_bin<kCoarseBins>(workspace.coarse_bins, args.shape.k, &shared.find);
  const uint32_t guess = coarse.bin << kCoarseShift;
  // With heavy ties there may be more candidates than room: the selection then reads memory itself.
  const bool fits = coarse.above + workspace.coarse_bins[coarse.bin] <= workspace.capacity;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    workspace.control->base = guess;
    workspace.control->from_memory = !fits;
  }
  for (uint32_t number = blockIdx.x; number < work_tile_count(args.shape.numel);
       number += gridDim.x) {
    const WorkTile tile(number, args.shape.numel);
    float x[kPerThread];
    load_floats(args.memory, tile, x);
    const uint32_t mask = reaching(tile, x, guess);
    if (fits) {
      const Compaction compaction =
          reserve(tile, mask, &workspace.control->refound, workspace, &shared.compact);
      if (compaction.stored)
        store_candidates(tile, mask, guess, compaction, workspace, shared.bins, shared.stage, x,
                         [](float value) { return value; });
    } else {
#pragma unroll
      for (int e = 0; e < kPerThread; ++e)
        if (mask >> e & 1) atomicAdd(&shared.bins[bin_of(magnitude_key(x[e]), guess)], 1u);
    }
  }
  __syncthreads();
  flush_bins<kBins>(shared.bins, workspace.repair_bins);
}

}  // namespace

void repair(const SelectArgs& args, const Stream& stream) {
  const int64_t tiles = work_tile_count(args.shapes[0].numel), ranges = args.ranges;
  const int64_t most = (kRepairBlocks + ranges - 1) / ranges;
  const Grid grid{tiles < most ? tiles : most, ranges};
  launch_early(coarse_kernel, grid, kThreads, stream, args);
  launch_early(recompact_kernel, grid, kThreads, stream, args);
}

}  // namespace gmc::cuda
