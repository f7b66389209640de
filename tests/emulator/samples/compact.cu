// Ordered compaction by one warp: 16-byte loads between a scalar head and tail, ballots for the
// places.
#include <cstdint>

#include "samples.h"

namespace {

constexpr unsigned all_lanes = 0xffffffffu;

// Appends value, where wanted, behind the *count values that out holds already.
__device__ __forceinline__ void append(float value, bool wanted, float* out, unsigned* count) {
  const unsigned lane = threadIdx.x % 32;
#ifdef BUG_MISSING_LANE
  const unsigned votes = lane < 31 || wanted ? __ballot_sync(all_lanes, wanted) : 0;
#else
  const unsigned votes = __ballot_sync(all_lanes, wanted);
#endif
  if (wanted) out[*count + __popc(votes & ((1u << lane) - 1))] = value;
  *count += __popc(votes);
}

__global__ void __launch_bounds__(32)
    compact_kernel(const float* __restrict__ x, int n, float* __restrict__ out, unsigned* total) {
  static __shared__ __align__(16) float staged[32 * 4];
  const int lane = threadIdx.x;
  unsigned count = 0;
  const int misaligned = int(reinterpret_cast<uintptr_t>(x) / sizeof(float) % 4);
#ifdef BUG_MISALIGNED
  const int head = 0;
#else
  const int head = min(n, (4 - misaligned) % 4);
#endif
  append(lane < head ? x[lane] : 0.0f, lane < head && x[lane] > 0, out, &count);
  int start = head;
  for (; start + 128 <= n; start += 128) {
    const float4 four = __ldcs(reinterpret_cast<const float4*>(x + start) + lane);
    *reinterpret_cast<float4*>(staged + 4 * lane) = four;
#ifndef BUG_MISSING_SYNCWARP
    __syncwarp();
#endif
    for (int i = lane; i < 128; i += 32) append(staged[i], staged[i] > 0, out, &count);
    __syncwarp();
  }
  for (; start < n; start += 32) {
    const int i = start + lane;
    append(i < n ? x[i] : 0.0f, i < n && x[i] > 0, out, &count);
  }
  if (lane == 0) *total = count;
}

}  // namespace

cudaError_t compact_launch(const float* x, int n, float* out, unsigned* count,
                           cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = 1;
  config.blockDim = 32;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, compact_kernel, x, n, out, count);
}
