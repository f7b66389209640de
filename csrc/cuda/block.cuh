// Sums over the threads of a warp and of a block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

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

}  // namespace gmc::cuda
