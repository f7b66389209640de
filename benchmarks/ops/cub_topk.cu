// What a CUDA programmer would build from the toolkit's parts: one kernel that accumulates,
// cub::DeviceTopK, one kernel that takes the values out. A plain shared library, without torch,
// loaded by cub_topk.py. Unordered, and not the same from run to run, unlike compress_.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>

#include <cstdint>
#include <cub/version.cuh>

#if CUB_VERSION < 300200
#error "cub::DeviceTopK needs CCCL 3.2 or later"
#endif

#include <cuda/__execution/determinism.h>
#include <cuda/__execution/output_ordering.h>
#include <cuda/__execution/require.h>
#include <cuda/std/__execution/env.h>

#include <cub/device/device_topk.cuh>
#include <cuda/stream_ref>

namespace {

__device__ float as_float(float x) { return x; }
__device__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};

template <typename Grad>
__global__ void accumulate_kernel(float* memory, const Grad* grad, const float* momentum,
                                  float beta, int64_t n) {
  const int64_t first = 4 * (int64_t{blockIdx.x} * blockDim.x + threadIdx.x);
  if (first + 4 <= n) {
    auto v = *reinterpret_cast<Four<float>*>(memory + first);
    const auto g = *reinterpret_cast<const Four<Grad>*>(grad + first);
    const auto a = *reinterpret_cast<const Four<float>*>(momentum + first);
    for (int i = 0; i < 4; ++i) v.x[i] += as_float(g.x[i]) + beta * a.x[i];
    *reinterpret_cast<Four<float>*>(memory + first) = v;
    return;
  }
  for (int64_t i = first; i < n; ++i) memory[i] += as_float(grad[i]) + beta * momentum[i];
}

__global__ void take_kernel(float* memory, const uint32_t* indices, __nv_bfloat16* values,
                            int64_t k) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= k) return;
  const float v = memory[indices[i]];
  values[i] = __float2bfloat16(v);
  memory[indices[i]] = v - __bfloat162float(values[i]);
}

struct Magnitude {  // its bits order as |v| does
  __host__ __device__ uint32_t operator()(uint32_t bits) const { return bits & 0x7fffffffu; }
};

cudaError_t top_k(void* workspace, size_t& nbytes, const float* memory, uint32_t* keys,
                  uint32_t* indices, int64_t n, int64_t k, cudaStream_t stream) {
  const auto requirements = cuda::execution::require(cuda::execution::determinism::not_guaranteed,
                                                     cuda::execution::output_ordering::unsorted);
  const auto environment = cuda::std::execution::env{cuda::stream_ref{stream}, requirements};
  const auto magnitudes =
      thrust::make_transform_iterator(reinterpret_cast<const uint32_t*>(memory), Magnitude{});
  return cub::DeviceTopK::MaxPairs(workspace, nbytes, magnitudes, keys,
                                   thrust::counting_iterator<uint32_t>(0), indices,
                                   static_cast<uint32_t>(n), static_cast<uint32_t>(k), environment);
}

unsigned blocks(int64_t threads) { return static_cast<unsigned>((threads + 255) / 256); }

}  // namespace

extern "C" {

int cub_topk_version() { return CUB_VERSION; }

int cub_topk_workspace(int64_t n, int64_t k, size_t* nbytes) {
  *nbytes = 0;
  return top_k(nullptr, *nbytes, nullptr, nullptr, nullptr, n, k, nullptr);
}

// memory, momentum: float32 [n]; grad: float32 or bfloat16 [n], all 16-byte aligned; keys, indices:
// uint32 [k]; values: bfloat16 [k]. Returns a cudaError_t.
int cub_topk_compress(float* memory, const void* grad, int grad_is_bf16, const float* momentum,
                      float beta, int64_t n, int64_t k, void* workspace, size_t nbytes,
                      uint32_t* keys, uint32_t* indices, void* values, cudaStream_t stream) {
  const unsigned grid = blocks((n + 3) / 4);
  if (grad_is_bf16) {
    accumulate_kernel<<<grid, 256, 0, stream>>>(memory, static_cast<const __nv_bfloat16*>(grad),
                                                momentum, beta, n);
  } else {
    accumulate_kernel<<<grid, 256, 0, stream>>>(memory, static_cast<const float*>(grad), momentum,
                                                beta, n);
  }
  if (cudaError_t error = cudaGetLastError()) return error;
  if (cudaError_t error = top_k(workspace, nbytes, memory, keys, indices, n, k, stream)) {
    return error;
  }
  take_kernel<<<blocks(k), 256, 0, stream>>>(memory, indices, static_cast<__nv_bfloat16*>(values),
                                             k);
  return cudaGetLastError();
}

}  // extern "C"
