// Searching a histogram for the bin that holds the k-th largest key.
#pragma once

#include "block.cuh"
#include "sizes.h"

namespace gmc::cuda {

struct FoundBin {
  uint32_t bin, above;  // above: how many lie in the bins above it
};

template <int kBlock = kThreads>
struct FindShared {
  uint32_t warp_sums[kBlock / 32];
  FoundBin found;
};

// All threads of the block get the answer. bins holds kCount counts whose sum is at least k; if it
// is not (a defect), bin 0 comes back and the final count of entries tells.
template <int kCount, int kBlock = kThreads>
__device__ __forceinline__ FoundBin find_bin(const uint32_t* bins, uint32_t k,
                                             FindShared<kBlock>* shared) {
  constexpr int kEach = kCount / kBlock;
  static_assert(kCount % kBlock == 0, "each thread sums as many bins");
  const uint32_t* own = bins + kCount - (threadIdx.x + 1) * kEach;  // thread 0: the highest bins
  uint32_t sum = 0;
  for (int i = 0; i < kEach; ++i) sum += own[i];
  if (threadIdx.x == 0) shared->found = {0, 0};
  uint32_t total;
  uint32_t above = block_exclusive_sum<kBlock>(sum, &total, shared->warp_sums);
  if (above < k && k <= above + sum) {
    int i = kEach - 1;
    for (; above + own[i] < k; --i) above += own[i];
    shared->found = {static_cast<uint32_t>(kCount - (threadIdx.x + 1) * kEach + i), above};
  }
  __syncthreads();
  return shared->found;
}

// Counts in shared memory first: equal keys are common, and would queue up at one global address.
template <int kCount>
__device__ __forceinline__ void clear_bins(uint32_t* shared_bins) {
  for (int i = threadIdx.x; i < kCount; i += static_cast<int>(blockDim.x)) shared_bins[i] = 0;
}

template <int kCount>
__device__ __forceinline__ void flush_bins(const uint32_t* shared_bins, uint32_t* bins) {
  for (int i = threadIdx.x; i < kCount; i += kThreads)
    if (shared_bins[i]) atomicAdd(&bins[i], shared_bins[i]);
}

}  // namespace gmc::cuda
