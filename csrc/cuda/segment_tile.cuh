// A work tile of a list of tensors.
//
// Tiles that hold one tensor's elements alone, aligned, take wide loads and stores. The others (at
// tensors' ends, or of an unaligned tensor) go element by element, still coalesced.
#pragma once

#include "segments.h"
#include "tile.cuh"

namespace gmc::cuda {

__device__ __forceinline__ void zero(float (&x)[kPerThread]) {
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) x[e] = 0.0f;
}

// The tensors that share a tile.
struct TileSegments {
  const TableSegment* first;
  int left;    // from the first on, to the end of the table
  bool whole;  // the first holds all of the tile, and the tile is a full one

  __device__ TileSegments(const TableSegment* segments, int count, int64_t numel,
                          const WorkTile& tile) {
    const int index = find_segment(segments, count, tile.begin);
    first = segments + index;
    left = count - index;
    whole = tile.full() && tile.begin + tile.size <= (left > 1 ? first[1].begin : numel);
  }

  // How many they are.
  __device__ int count(const WorkTile& tile) const {
    return find_segment(first, left, tile.begin + tile.size - 1) + 1;
  }
};

// Calls function(format, words) with the thread's first element, and returns true, if the tile's
// elements are aligned to quads.
template <class Function>
__device__ __forceinline__ bool with_quads(const TableSegment& segment, const WorkTile& tile,
                                           const Function& function) {
  return with_dtype(segment.dtype, [&](auto format) {
    using Word = typename decltype(format)::Word;
    Word* const words = static_cast<Word*>(segment.data) + (tile.begin - segment.begin);
    if (!aligned(words, 4 * sizeof(Word))) return false;
    function(format, words + 4 * threadIdx.x);
    return true;
  });
}

// Elements past the end of the bucket read as zero. stage: kWorkTile floats of shared memory.
__device__ __forceinline__ void load_segments(const TableSegment* segments, int count,
                                              int64_t numel, const WorkTile& tile, float* stage,
                                              float (&x)[kPerThread]) {
  const TileSegments shared(segments, count, numel, tile);
  if (shared.whole) {
    const TableSegment segment = *shared.first;
    if (!segment.data) return zero(x);
    if (with_quads(segment, tile,
                   [&](auto format, const auto* words) { load_quads<decltype(format)>(words, x); }))
      return;
  }
  const int candidates = shared.count(tile);
  for (uint32_t place = threadIdx.x; place < kWorkTile; place += kThreads) {
    float value = 0.0f;
    if (place < tile.size) {
      const uint32_t i = tile.begin + place;
      const TableSegment segment = shared.first[find_segment(shared.first, candidates, i)];
      if (segment.data) value = load_value(segment.data, segment.dtype, i - segment.begin);
    }
    stage[place] = value;
  }
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) x[e] = stage[tile.place(e)];
  __syncthreads();  // before anyone uses the stage again
}

}  // namespace gmc::cuda
