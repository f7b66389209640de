// verdict: whether the headers of all ranks' payloads say that a step must be skipped.
#include "shared/calls.h"

namespace gmc::cpu {
namespace {

BucketVerdict verdict_over(const Gathered& bucket) {
  BucketVerdict verdict;
  for (int64_t rank = 0; rank < bucket.ranks; ++rank) {
    if (bucket.nbytes == 0) {
      const float* const counts = at<float>(bucket.data, 0);
      verdict.add(counts[rank], counts[bucket.ranks + rank]);
    } else {
      verdict.add(read_header(bucket.data + rank * bucket.nbytes), bucket.nbytes);
    }
  }
  return verdict;
}

}  // namespace

void run(const VerdictCall& call) {
  *call.flags = 0;
  for (const Gathered& bucket : call.buckets) *call.flags |= verdict_over(bucket).result();
}

}  // namespace gmc::cpu
