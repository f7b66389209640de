// The repair: when the guess gave too few candidates, too many, or none near the k-th largest, a
// better one comes from a coarse histogram of all of memory, and memory is compacted again. Both
// kernels end at once when the pass did well.
#include "bins.cuh"
#include "compress.h"
#include "launch.h"
#include "tile.cuh"

namespace gmc::cuda {
namespace {

__device__ __forceinline__ bool guess_failed(const SelectArgs& args) {
  const Control& control = *args.workspace.control;
  return control.guess == 0 || control.found < args.shape.k ||
         control.found > args.workspace.capacity ||
         args.workspace.pass_bins[kBins - 1] >= args.shape.k;  // the last bin has no upper end
}

__global__ void __launch_bounds__(kThreads) coarse_kernel(const __grid_constant__ SelectArgs args) {
  static __shared__ uint32_t bins[kCoarseBins];
  const bool repair = guess_failed(args);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    args.workspace.control->repair = repair;
    args.workspace.control->source = kFromPass;
  }
  if (!repair) return;
  clear_bins<kCoarseBins>(bins);
  __syncthreads();
  for (uint32_t number = blockIdx.x; number < work_tile_count(args.shape.numel);
       number += gridDim.x) {
    const WorkTile tile(number, args.shape.numel);
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
  FindShared find;
  CompactShared compact;
  uint32_t bins[kBins];
};

__global__ void __launch_bounds__(kThreads)
    recompact_kernel(const __grid_constant__ SelectArgs args) {
  static __shared__ RepairShared shared;
  const Workspace& workspace = args.workspace;
  if (!workspace.control->repair) return;
  clear_bins<kBins>(shared.bins);
  const FoundBin coarse = find_bin<kCoarseBins>(workspace.coarse_bins, args.shape.k, &shared.find);
  const uint32_t guess = coarse.bin << kCoarseShift;
  // With heavy ties there may be more candidates than room: the selection then reads memory itself.
  const bool fits = coarse.above + workspace.coarse_bins[coarse.bin] <= workspace.capacity;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    workspace.control->repair_key = guess;
    workspace.control->source = fits ? kFromRepair : kFromMemory;
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
      store_candidates(tile, mask, x, guess, compaction, workspace, shared.bins);
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

cudaError_t repair_launch(const SelectArgs& args, cudaStream_t stream) {
  const int64_t tiles = work_tile_count(args.shape.numel);
  const int64_t blocks = tiles < kRepairBlocks ? tiles : kRepairBlocks;
  const cudaError_t status = launch(coarse_kernel, blocks, kThreads, stream, args);
  if (status != cudaSuccess) return status;
  return launch(recompact_kernel, blocks, kThreads, stream, args);
}

}  // namespace gmc::cuda
