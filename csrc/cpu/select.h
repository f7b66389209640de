// Exact selection of the k largest magnitudes, ties to the lowest index.
#pragma once

#include <cstdint>
#include <vector>

#include "shared/scale.h"

namespace gmc::cpu {

// The values of one part, in index order: the bits in a candidate list, or a stretch of memory.
struct KeySpan {
  const void* words;  // 4 bytes each
  int64_t size;
};

// What each part contributes to the k selected entries.
struct Selection {
  uint32_t threshold;             // the k-th largest key
  Exponents exponents;            // of the k
  std::vector<int64_t> ties;      // per part: how many of its first keys equal to threshold
  std::vector<int64_t> position;  // per part: where its first entry goes among the k
};

// A key that at least k keys reach, usually not many more. It costs one pass over the spans, which
// together hold at least k keys.
uint32_t lower_bound(const std::vector<KeySpan>& spans, int64_t k);
// The spans together hold at least k keys. may_saturate: how many of the k may saturate (scale.h).
Selection select(const std::vector<KeySpan>& spans, int64_t k, int64_t may_saturate);

}  // namespace gmc::cpu
