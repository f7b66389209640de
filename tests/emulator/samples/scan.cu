// A prefix sum over tiles, in dynamic shared memory: two rows that swap roles at every step.
#include "samples.h"

extern __shared__ unsigned dynamic_shared[];

namespace {

template <int threads>
__global__ void __launch_bounds__(threads)
    scan_kernel(const unsigned* __restrict__ x, int n, unsigned* __restrict__ out) {
  const int t = threadIdx.x;
  unsigned* row = dynamic_shared;
  unsigned* other = dynamic_shared + threads;
  unsigned before = 0;  // the sum of all tiles before this one
  for (int start = 0; start < n; start += threads) {
    const int i = start + t;
#ifdef BUG_EARLY_EXIT
    if (i >= n) return;
#endif
#ifdef BUG_UNINITIALISED
    if (i > 0) row[t] = i < n ? x[i] : 0;
#else
    row[t] = i < n ? x[i] : 0;
#endif
    __syncthreads();
    for (int step = 1; step < threads; step *= 2) {
#ifdef BUG_OUT_OF_BOUNDS_SHARED
      other[t + (step == 1)] = t >= step ? row[t] + row[t - step] : row[t];
#else
      other[t] = t >= step ? row[t] + row[t - step] : row[t];
#endif
#ifdef BUG_DIVERGENT_BARRIER
      if (t >= step)
        __syncthreads();
      else
        __syncthreads();
#elif !defined(BUG_MISSING_BARRIER)
      __syncthreads();
#endif
      unsigned* swap = row;
      row = other;
      other = swap;
    }
#ifdef BUG_OUT_OF_BOUNDS_GLOBAL
    out[i] = before + row[t];
#else
    if (i < n) out[i] = before + row[t];
#endif
    before += row[threads - 1];
#ifndef BUG_MISSING_LAST_BARRIER
    __syncthreads();  // the next tile overwrites row
#endif
  }
}

}  // namespace

cudaError_t scan_launch(const unsigned* x, int n, unsigned* out, cudaStream_t stream) {
  constexpr int threads = 64;
  cudaLaunchConfig_t config = {};
  config.gridDim = 1;
  config.blockDim = threads;
  config.dynamicSmemBytes = 2 * threads * sizeof(unsigned);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, scan_kernel<threads>, x, n, out);
}
