// Exact selection of the k largest magnitudes, ties to the lowest index.
#pragma once

#include <cstdint>
#include <vector>

namespace gmc::cpu {

// The keys of one part, in index order: either a candidate list's or a stretch of memory itself
// (whose sign bits are ignored).
struct KeySpan {
  const uint32_t* words;
  int64_t size;
};

// What each part contributes to the k selected entries.
struct Selection {
  uint32_t threshold;             // the k-th largest key
  std::vector<int64_t> ties;      // per part: how many of its first keys equal to threshold
  std::vector<int64_t> position;  // per part: where its first entry goes among the k
};

// The spans together must hold at least k keys.
Selection select(const std::vector<KeySpan>& spans, int64_t k);

}  // namespace gmc::cpu
