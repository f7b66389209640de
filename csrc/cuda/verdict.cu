// verdict: whether the headers of all ranks' payloads say that a step must be skipped.
#include <algorithm>

#include "block.cuh"
#include "launch.h"
#include "shared/calls.h"

namespace gmc::cuda {
namespace {

constexpr int kBuckets = 128;  // travel as kernel parameters
struct Buckets {
  Gathered bucket[kBuckets];
  int count;
};

// Runs as one block, whose warps take a bucket each. Further launches add to what the first one
// wrote.
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
    // A lane whose smallest tag is below the largest of all lanes finds the mismatch.
    verdict.largest = __reduce_max_sync(kAllLanes, verdict.largest);
    own |= verdict.result();
  }
  uint32_t found = 0;
  for (const uint32_t bit : {kNonfinite, kDamaged, kMismatch, kOff})
    if (__syncthreads_or(own & bit)) found |= bit;
  if (threadIdx.x == 0) *flags = (first ? 0 : *flags) | found;
}

}  // namespace

void run(const VerdictCall& call, const Stream& stream) {
  const int count = static_cast<int>(call.buckets.size());
  for (int first = 0; first < count; first += kBuckets) {
    Buckets buckets = {};
    buckets.count = std::min(count - first, kBuckets);
    std::copy_n(call.buckets.begin() + first, buckets.count, buckets.bucket);
    launch(verdict_kernel, 1, kThreads, stream, buckets, first == 0, call.flags);
  }
}

}  // namespace gmc::cuda
