// A maximum over blocks in one launch: the block that draws the last ticket reads what all have
// written.
#include "samples.h"

namespace {

constexpr int threads = 64;

__device__ int block_max(int value) {
  static __shared__ int warp_max[threads / 32];
  value = __reduce_max_sync(0xffffffffu, value);
  if (threadIdx.x % 32 == 0) warp_max[threadIdx.x / 32] = value;
  __syncthreads();
  return max(warp_max[0], warp_max[1]);
}

__global__ void __launch_bounds__(threads)
    last_block_kernel(const int* __restrict__ x, int n, int* partial, unsigned* ticket, int* out) {
#ifdef BUG_MISSING_WAIT
  if (threadIdx.x != 63)
#endif
    cudaGridDependencySynchronize();
  int best = -2147483647 - 1;
  for (int i = blockIdx.x * threads + threadIdx.x; i < n; i += gridDim.x * threads)
    best = max(best, x[i]);
  best = block_max(best);
  bool last = false;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = best;
#ifndef BUG_MISSING_FENCE
    __threadfence();
#endif
    last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
#ifdef BUG_SPIN
  while (threadIdx.x == 0 && atomicAdd(ticket, 0u) != 0) {
  }
#elif defined(BUG_SILENT_SPIN)
  while (threadIdx.x == 0 && *static_cast<volatile unsigned*>(ticket) != 0) {
  }
#endif
  if (__syncthreads_or(last)) {
    best = -2147483647 - 1;
    for (int b = threadIdx.x; b < gridDim.x; b += threads) best = max(best, __ldcg(partial + b));
    best = block_max(best);
    if (threadIdx.x == 0) *out = best;
  }
}

}  // namespace

cudaError_t last_block_launch(const int* x, int n, int* partial, unsigned* ticket, int* out,
                              int blocks, cudaStream_t stream) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, last_block_kernel, x, n, partial, ticket, out);
}
