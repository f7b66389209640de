// How a bucket is shared out between threads: whole tiles, contiguous, in ascending order.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "../payload.h"

namespace gmc::cpu {

inline int64_t part_count(int64_t numel) {
  return std::min<int64_t>(tile_count(numel), at::get_num_threads());
}

// The first tile of a part; part == parts gives the end.
inline int64_t first_tile(int64_t part, int64_t parts, int64_t numel) {
  return tile_count(numel) * part / parts;
}

template <class Function>
void for_each_part(int64_t parts, const Function& function) {
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) function(part);
  });
}

inline int64_t tile_end(int64_t tile, int64_t numel) {
  return std::min<int64_t>((tile + 1) * kTile, numel);
}

}  // namespace gmc::cpu
