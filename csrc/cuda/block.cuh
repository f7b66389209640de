// What the threads of a warp or a block do together: sums, and histograms.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "sizes.h"

namespace gmc::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ unsigned lane_id() { return threadIdx.x % 32; }
__device__ __forceinline__ unsigned warp_id() { return threadIdx.x / 32; }
__device__ __forceinline__ unsigned lanes_below() { return (1u << lane_id()) - 1; }

template <class T>
__device__ __forceinline__ T warp_inclusive_sum(T x) {
#pragma unroll
  for (unsigned step = 1; step < 32; step *= 2) {
    const T other = __shfl_up_sync(kAllLanes, x, step);
    if (lane_id() >= step) x += other;
  }
  return x;
}

// The sum of x over the threads before this one; *total becomes the sum over all. scratch holds one
// T per warp and must not be touched again before the next barrier.
template <int kBlock, class T>
__device__ __forceinline__ T block_exclusive_sum(T x, T* total, T* scratch) {
  const T inclusive = warp_inclusive_sum(x);
  if (lane_id() == 31) scratch[warp_id()] = inclusive;
  __syncthreads();
  T before = 0, sum = 0;
#pragma unroll
  for (unsigned warp = 0; warp < kBlock / 32; ++warp) {
    before += warp < warp_id() ? scratch[warp] : 0;
    sum += scratch[warp];
  }
  *total = sum;
  return before + inclusive - x;
}

// Adds the block's sum of x to *counter, one atomic per warp that has any.
__device__ __forceinline__ void add_to_counter(uint32_t* counter, uint32_t x) {
  const uint32_t sum = __reduce_add_sync(kAllLanes, x);
  if (lane_id() == 0 && sum != 0) atomicAdd(counter, sum);
}

struct FoundBin {
  uint32_t bin, above;  // above: how many lie in the bins above it
};

template <int kBlock = kThreads>
struct FindShared {
  uint32_t warp_sums[kBlock / 32];
  FoundBin found;
};

// The bin that holds the k-th largest key; all threads of the block get it. bins holds kCount
// counts whose sum is at least k. If it is less (a defect), the result is bin 0, and emit's count
// of entries shows it.
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

// Histograms are counted in shared memory first, because equal keys are common and would queue at
// one global address.
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
