// fingerprint: 64 bits for each tensor of a list, which tell replicas that differ.
#include <algorithm>

#include "../fingerprint.h"
#include "block.cuh"
#include "kernels.h"
#include "launch.h"

namespace gmc::cuda {
namespace {

constexpr int64_t kMostBlocks = 1024;

__global__ void __launch_bounds__(kThreads)
    fingerprint_kernel(const void* data, DType dtype, int64_t numel, unsigned long long* print) {
  static __shared__ unsigned long long warp_sums[kWarps];
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  unsigned long long sum = 0, total;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < numel; i += step)
    sum += fingerprint_term(data, dtype, i);
  block_exclusive_sum<kThreads>(sum, &total, warp_sums);
  if (threadIdx.x == 0) atomicAdd(print, total);
}

}  // namespace

cudaError_t fingerprint_launch(const void* data, DType dtype, int64_t numel,
                               unsigned long long* print, cudaStream_t stream) {
  const cudaError_t status = cudaMemsetAsync(print, 0, sizeof *print, stream);
  if (status != cudaSuccess || numel == 0) return status;
  const int64_t blocks = std::min((numel + kWorkTile - 1) / kWorkTile, kMostBlocks);
  return launch(fingerprint_kernel, blocks, kThreads, stream, data, dtype, numel, print);
}

}  // namespace gmc::cuda
