// A grid-stride sum: registers, then warps by shuffle, then the block in shared memory.
#include "samples.h"

namespace {

#ifdef BUG_OUT_OF_BOUNDS_STATIC
// Not inlined, so that nothing here tells how long the row is.
__device__ __attribute__((noinline)) void store(unsigned* row, int i, unsigned value) {
  row[i] = value;
}
#endif

template <int threads>
__global__ void __launch_bounds__(threads)
    sum_kernel(const int* __restrict__ x, int n, unsigned* total) {
  static __shared__ unsigned warp_sums[threads / 32];
  static __shared__ unsigned negative;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#ifndef BUG_UNINITIALISED
  if (threadIdx.x == 0) negative = 0;
#endif
  __syncthreads();
  unsigned sum = 0, below_zero = 0;
  for (int i = blockIdx.x * threads + threadIdx.x; i < n; i += gridDim.x * threads) {
    sum += unsigned(x[i]);
    below_zero += x[i] < 0;
  }
#ifdef BUG_PLAIN_INCREMENT
  if (below_zero > 0) negative += below_zero;
#else
  if (below_zero > 0) atomicAdd(&negative, below_zero);
#endif
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
#ifdef BUG_OUT_OF_BOUNDS_STATIC
  if (lane == 0) store(warp_sums, warp + 1, sum);
#else
  if (lane == 0) warp_sums[warp] = sum;
#endif
#ifndef BUG_MISSING_BARRIER
  __syncthreads();
#endif
  if (threadIdx.x == 0) {
    unsigned block_sum = 0;
    for (int w = 0; w < threads / 32; ++w) block_sum += warp_sums[w];
#ifdef BUG_FLOAT_ATOMIC
    atomicAdd(reinterpret_cast<float*>(total), float(block_sum));
#elif defined(BUG_PLAIN_TOTAL)
    total[0] += block_sum;  // no two blocks run at once here, but on a GPU they do
#else
    atomicAdd(total, block_sum);
#endif
    atomicAdd(total + 1, negative);
  }
}

}  // namespace

cudaError_t sum_launch(const int* x, int n, unsigned* total, int blocks, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(total, 0, 2 * sizeof(unsigned), stream);
  if (error != cudaSuccess) return error;
  constexpr int threads = 64;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, sum_kernel<threads>, x, n, total);
}
