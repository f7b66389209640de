// Three kernels in a row of which the second and the third may start early.
#include "samples.h"

namespace {

constexpr int threads = 64;

// The second kernel may start at once: it waits for all that this one does.
__global__ void __launch_bounds__(threads) first_kernel(const int* x, int n, int* a) {
#ifndef BUG_READ_TOO_EARLY_WITHOUT_A_TRIGGER
  cudaTriggerProgrammaticLaunchCompletion();
#endif
  const int i = blockIdx.x * threads + threadIdx.x;
  if (i < n) a[i] = 3 * x[i];
}

__global__ void __launch_bounds__(threads)
    second_kernel(int* x, const int* y, int n, const int* a, int* b) {
  static __shared__ int before_the_wait[threads];
  const int i = blockIdx.x * threads + threadIdx.x;
  before_the_wait[threadIdx.x] = i < n ? y[i] : 0;  // nobody writes y
#ifdef BUG_TRIGGER_TOO_EARLY
  cudaTriggerProgrammaticLaunchCompletion();
#endif
#if defined(BUG_READ_TOO_EARLY) || defined(BUG_READ_TOO_EARLY_WITHOUT_A_TRIGGER)
  const int other = i < n ? a[n - 1 - i] : 0;
#endif
#ifdef BUG_WRITE_TOO_EARLY
  if (i < n) x[i] = 0;
#endif
#ifdef BUG_MISSING_WAIT_ON_ONE_PATH
  if (blockIdx.x != 1)
#endif
    cudaGridDependencySynchronize();
#ifndef BUG_TRIGGER_TOO_EARLY
  // Behind the wait, because the third kernel counts on the first one's end when it starts.
  cudaTriggerProgrammaticLaunchCompletion();
#endif
#if !defined(BUG_READ_TOO_EARLY) && !defined(BUG_READ_TOO_EARLY_WITHOUT_A_TRIGGER)
  const int other = i < n ? a[n - 1 - i] : 0;
#endif
  if (i < n) b[i] = before_the_wait[threadIdx.x] + other;
#ifndef BUG_WRITE_TOO_EARLY
  if (i < n) x[i] = 0;
#endif
}

__global__ void __launch_bounds__(threads)
    third_kernel(const int* a, const int* b, int n, int* out) {
  const int i = blockIdx.x * threads + threadIdx.x;
  const int own = i < n ? a[i] : 0;
  cudaGridDependencySynchronize();
  if (i < n) out[i] = own + b[n - 1 - i];
}

template <class... Parameters>
cudaError_t launch(bool early, void (*kernel)(Parameters...), int n, cudaStream_t stream,
                   Parameters... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = (n + threads - 1) / threads;
  config.blockDim = threads;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace

cudaError_t early_launch(int* x, const int* y, int n, int* a, int* b, int* out,
                         cudaStream_t stream) {
  cudaError_t error = launch<const int*, int, int*>(false, first_kernel, n, stream, x, n, a);
  if (error != cudaSuccess) return error;
  error = launch<int*, const int*, int, const int*, int*>(true, second_kernel, n, stream, x, y, n,
                                                          a, b);
  if (error != cudaSuccess) return error;
  return launch<const int*, const int*, int, int*>(true, third_kernel, n, stream, a, b, n, out);
}
