// The tensors of a bucket, piece by piece.
#pragma once

#include <algorithm>
#include <vector>

#include "shared/bucket.h"

namespace gmc::cpu {

// The segment that holds element i, or the one after it.
inline size_t find_segment(const std::vector<Segment>& segments, int64_t i) {
  return std::partition_point(segments.begin(), segments.end(),
                              [i](const Segment& s) { return s.begin + s.numel <= i; }) -
         segments.begin();
}

inline char* element(const Segment& segment, int64_t i) {
  return static_cast<char*>(segment.data) + i * element_size(segment.dtype);
}

// Calls function(segment, offset in the segment, offset in the stretch, length) for the pieces that
// make up [begin, end), starting the search at *first and leaving it at the last piece's segment.
template <class Function>
void for_each_piece(const std::vector<Segment>& segments, size_t* first, int64_t begin, int64_t end,
                    const Function& function) {
  for (size_t s = *first; s < segments.size() && segments[s].begin < end; ++s) {
    const Segment& segment = segments[s];
    const int64_t from = std::max(begin, segment.begin);
    const int64_t to = std::min(end, segment.begin + segment.numel);
    *first = s;
    if (from < to) function(segment, from - segment.begin, from - begin, to - from);
  }
}

}  // namespace gmc::cpu
