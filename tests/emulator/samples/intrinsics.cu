// One warp calls what the other samples leave out; each lane writes one row of results.
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

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), int blocks, int threads, cudaStream_t stream,
                   Parameters... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace

cudaError_t warp_launch(const unsigned* x, unsigned* out, cudaStream_t stream) {
  return launch(warp_kernel, 1, 32, stream, x, out);
}

cudaError_t bits_launch(const unsigned* x, unsigned* out, cudaStream_t stream) {
  return launch(bits_kernel, 1, 64, stream, x, out);
}

cudaError_t atomics_launch(const unsigned* x, unsigned* out, cudaStream_t stream) {
  return launch(atomics_kernel, 3, 64, stream, x, out);
}

cudaError_t turns_launch(unsigned* turn, unsigned* out, cudaStream_t stream) {
  return launch(turns_kernel, 1, 64, stream, turn, out);
}
