// What the headers of payloads and aggregates say: the verdict whether this step must be skipped,
// the counts of non-finite values, the flags of aggregates.
#include <algorithm>

#include "block.cuh"
#include "kernels.h"
#include "launch.h"

namespace gmc::cuda {
namespace {

constexpr int kBuckets = 128;  // travel as kernel parameters
struct Buckets {
  Gathered bucket[kBuckets];
  int count;
};

constexpr int kAggregates = 256;
struct Aggregates {
  const uint8_t* data[kAggregates];
};

// One block, whose warps take a bucket each. Further launches add to what the first one wrote.
__global__ void __launch_bounds__(kThreads)
    verdict_kernel(const __grid_constant__ Buckets buckets, bool first, uint32_t* flags) {
  uint32_t own = 0;
  for (int b = static_cast<int>(warp_id()); b < buckets.count; b += kWarps) {
    const Gathered& bucket = buckets.bucket[b];
    BucketVerdict verdict;
    for (int64_t rank = lane_id(); rank < bucket.ranks; rank += 32) {
      if (bucket.nbytes == 0) {
        const float* const counts = at<float>(bucket.data, 0);
        verdict.add(counts[rank], counts[bucket.ranks + rank]);
      } else {
        verdict.add(read_header(bucket.data + rank * bucket.nbytes), bucket.nbytes);
      }
    }
    // A lane that has a smaller tag than the largest one of all finds the mismatch.
    verdict.largest = __reduce_max_sync(kAllLanes, verdict.largest);
    own |= verdict.result();
  }
  uint32_t found = 0;
  for (const uint32_t bit : {kNonfinite, kDamaged, kMismatch, kOff})
    if (__syncthreads_or(own & bit)) found |= bit;
  if (threadIdx.x == 0) *flags = (first ? 0 : *flags) | found;
}

__global__ void __launch_bounds__(kThreads)
    nonfinite_kernel(Gathered payloads, int64_t* nonfinite) {
  for (int64_t rank = threadIdx.x; rank < payloads.ranks; rank += kThreads)
    nonfinite[rank] = read_header(payloads.data + rank * payloads.nbytes).nonfinite;
}

__global__ void __launch_bounds__(kThreads)
    flags_kernel(const __grid_constant__ Aggregates aggregates, int count, int32_t* flags) {
  for (int i = threadIdx.x; i < count; i += kThreads)
    flags[i] = static_cast<int32_t>(at<AggregateHeader>(aggregates.data[i], 0)->flags);
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

cudaError_t payload_nonfinite_launch(const Gathered& payloads, int64_t* nonfinite,
                                     cudaStream_t stream) {
  return launch(nonfinite_kernel, 1, kThreads, stream, payloads, nonfinite);
}

cudaError_t aggregate_flags_launch(const uint8_t* const* aggregates, int count, int32_t* flags,
                                   cudaStream_t stream) {
  for (int first = 0; first < count; first += kAggregates) {
    Aggregates part = {};
    const int length = std::min(count - first, kAggregates);
    std::copy_n(aggregates + first, length, part.data);
    const cudaError_t status =
        launch(flags_kernel, 1, kThreads, stream, part, length, flags + first);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace gmc::cuda
