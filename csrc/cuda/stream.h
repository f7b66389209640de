// Where an operator's kernels run, and how an error of CUDA leaves a function.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>

namespace gmc::cuda {

struct CudaError {
  cudaError_t status;
};

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw CudaError{status};
}

// Where an operator's kernels run. The device is the current one.
struct Stream {
  cudaStream_t stream;
  // Device memory that stays until the kernels that are on the stream by then have run.
  std::function<void*(int64_t nbytes)> allocate;
};

}  // namespace gmc::cuda
