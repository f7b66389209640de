// Two streams: what one makes, the other uses.
#include "samples.h"

namespace {

constexpr int threads = 64;

__global__ void __launch_bounds__(threads) make_kernel(const int* x, int n, int* made) {
  const int i = blockIdx.x * threads + threadIdx.x;
  if (i < n) made[i] = 3 * x[i];
}

__global__ void __launch_bounds__(threads) use_kernel(const int* made, int n, int* out) {
  const int i = blockIdx.x * threads + threadIdx.x;
  if (i < n) out[i] += made[n - 1 - i];
}

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), int n, cudaStream_t stream,
                   Parameters... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = (n + threads - 1) / threads;
  config.blockDim = threads;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace

cudaError_t streams_launch(const int* x, int n, int* made, int* out, cudaStream_t making,
                           cudaStream_t using_it, cudaEvent_t event) {
  cudaError_t error = launch<const int*, int, int*>(make_kernel, n, making, x, n, made);
  if (error != cudaSuccess) return error;
#ifdef BUG_MEMSET_ON_THE_OTHER_STREAM
  error = cudaEventRecord(event, making);
  if (error == cudaSuccess) error = cudaMemsetAsync(out, 0, n * sizeof(int), making);
#else
  error = cudaMemsetAsync(out, 0, n * sizeof(int), using_it);
  if (error == cudaSuccess) error = cudaEventRecord(event, making);
#endif
  if (error != cudaSuccess) return error;
#ifndef BUG_MISSING_EVENT
  error = cudaStreamWaitEvent(using_it, event);
  if (error != cudaSuccess) return error;
#endif
  error = launch<const int*, int, int*>(use_kernel, n, using_it, made, n, out);
  if (error != cudaSuccess) return error;
#ifdef BUG_HOST_WAITS_FOR_THE_OTHER_STREAM
  return cudaStreamSynchronize(making);
#else
  return cudaStreamSynchronize(using_it);
#endif
}
