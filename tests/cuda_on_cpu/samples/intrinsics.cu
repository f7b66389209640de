// One warp calls what the other samples leave out; each lane writes one row of results.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "samples.h"

namespace {

__global__ void warp_kernel(const unsigned* x, unsigned* out) {
  constexpr unsigned all = 0xffffffffu;
  const unsigned lane = threadIdx.x, value = x[lane];
  unsigned* row = out + lane * warp_results;
  row[0] = __shfl_sync(all, value, 5);
  row[1] = __shfl_sync(all, value, lane + 1, 8);
  row[2] = __shfl_up_sync(all, value, 3);
  row[3] = __shfl_down_sync(all, value, 3, 16);
  row[4] = __shfl_xor_sync(all, value, 9);
  row[5] = __ballot_sync(all, value & 1);
  row[6] = __any_sync(all, value == x[7]);
  row[7] = __all_sync(all, value & 1);
  row[8] = __reduce_add_sync(all, value);
  row[9] = unsigned(__reduce_min_sync(all, int(value)));
  row[10] = __reduce_max_sync(all, value);
  row[11] = __reduce_xor_sync(all, value);
  row[12] = __match_any_sync(all, value % 4);
  // The two halves of the warp work on their own, in code that the others do not run.
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  if (lane < 16)
    row[13] = __reduce_or_sync(half, value);
  else
    row[13] = __reduce_and_sync(half, value);
  row[14] = unsigned(__shfl_xor_sync(half, (unsigned long long)value << 32, 1) >> 32);
  row[15] = (unsigned)__syncthreads_count(value & 1);
}

__global__ void bits_kernel(const unsigned* x, unsigned* out) {
  const unsigned value = x[threadIdx.x], next = x[(threadIdx.x + 1) % blockDim.x];
  unsigned* row = out + threadIdx.x * bits_results;
  row[0] = __popc(value);
  row[1] = __ffs(value);
  row[2] = __clz(value);
  row[3] = __brev(value);
  row[4] = __umulhi(value, next);
  row[5] = __funnelshift_l(value, next, 9);
  row[6] = __funnelshift_r(value, next, 9);
  row[7] = __byte_perm(value, next, 0x5140);
}

// Every result is the same in whatever order the threads come.
__global__ void atomics_kernel(const unsigned* x, unsigned* out) {
  const unsigned value = x[blockIdx.x * blockDim.x + threadIdx.x];
  atomicMin(out, value);
  atomicMax(out + 1, value);
  atomicMin(reinterpret_cast<int*>(out) + 2, int(value));
  atomicAnd(out + 3, value | 0xffff);
  atomicOr(out + 4, value & 0xffff);
  atomicXor(out + 5, value);
  atomicInc(out + 6, 9);
  atomicDec(out + 7, 9);
  atomicSub(out + 8, value);
  unsigned seen = atomicAdd(out + 9, 0u), expected;
  do {
    expected = seen;
    seen = atomicCAS(out + 9, expected, expected * 3 % 65521);
  } while (seen != expected);
}

// The threads of a block take turns from the last to the first.
__global__ void turns_kernel(unsigned* turn, unsigned* out) {
  while (atomicAdd(turn, 0u) != blockDim.x - 1 - threadIdx.x) {
  }
  out[threadIdx.x] = atomicAdd(turn, 1u);
}

__global__ void convert_kernel(const float* x, int n, unsigned short* bf16, unsigned short* fp16,
                               float* from_fp16) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    bf16[i] = __bfloat16_as_ushort(__float2bfloat16_rn(x[i]));
    fp16[i] = __half_as_ushort(__float2half_rn(x[i]));
    from_fp16[i] = __half2float(__ushort_as_half(fp16[i]));
  }
}

}  // namespace

cudaError_t warp_launch(const unsigned* x, unsigned* out, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = 1;
  config.blockDim = 32;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, warp_kernel, x, out);
}

cudaError_t bits_launch(const unsigned* x, unsigned* out, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = 1;
  config.blockDim = 64;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, bits_kernel, x, out);
}

cudaError_t atomics_launch(const unsigned* x, unsigned* out, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = 3;
  config.blockDim = 64;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, atomics_kernel, x, out);
}

cudaError_t turns_launch(unsigned* turn, unsigned* out, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = 1;
  config.blockDim = 64;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, turns_kernel, turn, out);
}

cudaError_t convert_launch(const float* x, int n, unsigned short* bf16, unsigned short* fp16,
                           float* from_fp16, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = (n + 63) / 64;
  config.blockDim = 64;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, convert_kernel, x, n, bf16, fp16, from_fp16);
}
