// The verdict: whether this step must be skipped, from all headers of all ranks and buckets.
#include <algorithm>

#include "kernels.h"
#include "launch.h"

namespace gmc::cuda {
namespace {

constexpr int kBuckets = 128;  // travel as kernel parameters
struct Buckets {
  Gathered bucket[kBuckets];
  int count;
};

// Byte by byte: a size that is no payload's may put a header anywhere.
__device__ __forceinline__ uint32_t read_word(const uint8_t* at) {
  return at[0] | at[1] << 8 | at[2] << 16 | static_cast<uint32_t>(at[3]) << 24;
}

__device__ __forceinline__ uint32_t header_flags(const uint8_t* payload, int64_t nbytes) {
  const uint32_t tag = read_word(payload), k = read_word(payload + 8);
  const uint32_t numel = read_word(payload + 12);
  const auto wire = static_cast<DType>(tag >> 24 & 0xfu);
  const bool sound = wire <= DType::kFloat16 && tag == payload_tag(wire) && k >= 1 && k <= numel &&
                     PayloadLayout(numel, k, wire).nbytes == nbytes;
  return (sound ? 0 : kDamaged) | (read_word(payload + 4) != 0 ? kNonfinite : 0);
}

// One block. Further launches add to what the first one wrote.
__global__ void __launch_bounds__(kThreads)
    verdict_kernel(const __grid_constant__ Buckets buckets, bool first, uint32_t* flags) {
  uint32_t own = 0;
  for (int b = 0; b < buckets.count; ++b) {
    const Gathered& bucket = buckets.bucket[b];
    for (int64_t rank = threadIdx.x; rank < bucket.ranks; rank += kThreads)
      own |= header_flags(bucket.data + rank * bucket.nbytes, bucket.nbytes);
  }
  const uint32_t nonfinite = __syncthreads_or(own & kNonfinite) ? kNonfinite : 0;
  const uint32_t damaged = __syncthreads_or(own & kDamaged) ? kDamaged : 0;
  if (threadIdx.x == 0) *flags = (first ? 0 : *flags) | nonfinite | damaged;
}

}  // namespace

cudaError_t verdict_launch(const Gathered* gathered, int count, uint32_t* flags,
                           cudaStream_t stream) {
  for (int first = 0; first < count; first += kBuckets) {
    Buckets buckets = {};
    buckets.count = std::min(count - first, kBuckets);
    std::copy_n(gathered + first, buckets.count, buckets.bucket);
    const cudaError_t status =
        launch(verdict_kernel, 1, kThreads, stream, buckets, first == 0, flags);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace gmc::cuda
