// A work tile in the registers of a block: loaded from, and stored to, an array of floats or the
// tensors of a bucket.
//
// Thread t holds, for each quad q, the four elements from tile begin + 4 * (q * kThreads + t) on: a
// warp then reads 512 consecutive bytes with one 16-byte load per thread.
#pragma once

#include "segments.h"
#include "shared/rule.h"

namespace gmc::cuda {

struct WorkTile {
  uint32_t number, begin, size;  // size < kWorkTile in the last one only

  __device__ WorkTile(uint32_t number, int64_t numel)
      : number(number),
        begin(number * static_cast<uint32_t>(kWorkTile)),
        size(numel - begin < kWorkTile ? static_cast<uint32_t>(numel - begin) : kWorkTile) {}

  // The same tile of a range that begins at this element, as one of the bucket.
  __device__ WorkTile from(uint32_t element) const {
    WorkTile tile = *this;
    tile.begin += element;
    return tile;
  }

  __device__ bool full() const { return size == kWorkTile; }
  // The place of a thread's element in the tile.
  __device__ uint32_t place(int e) const { return 4 * threadIdx.x + step(e); }
  // The place counted from the thread's first element. The compiler knows it, so that one address
  // with constant offsets serves all of a thread's loads.
  static __device__ constexpr int step(int e) { return e / 4 * (4 * kThreads) + e % 4; }
};

__device__ __forceinline__ bool aligned(const void* pointer, uintptr_t nbytes) {
  return reinterpret_cast<uintptr_t>(pointer) % nbytes == 0;
}

// Loads a thread's 16 elements of a full tile by four accesses of 16 or 8 bytes. words: its first
// element.
template <class Format>
__device__ __forceinline__ void load_quads(const typename Format::Word* words,
                                           float (&x)[kPerThread]) {
  if constexpr (sizeof(typename Format::Word) == 4) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const float4 quad = __ldcs(reinterpret_cast<const float4*>(words + WorkTile::step(4 * q)));
      x[4 * q] = quad.x;
      x[4 * q + 1] = quad.y;
      x[4 * q + 2] = quad.z;
      x[4 * q + 3] = quad.w;
    }
  } else {
    uint2 quad[kQuads];
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
      quad[q] = __ldcs(reinterpret_cast<const uint2*>(words + WorkTile::step(4 * q)));
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      const uint32_t pair = e % 4 < 2 ? quad[e / 4].x : quad[e / 4].y;
      x[e] = Format::to_float(static_cast<uint16_t>(pair >> (16 * (e % 2))));
    }
  }
}

template <class Format>
__device__ __forceinline__ void store_quads(typename Format::Word* words,
                                            const float (&x)[kPerThread]) {
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const auto word = [&](int c) { return Format::round(x[4 * q + c]); };
    auto* const to = words + WorkTile::step(4 * q);
    if constexpr (sizeof(typename Format::Word) == 4) {
      __stcs(reinterpret_cast<float4*>(to), make_float4(word(0), word(1), word(2), word(3)));
    } else {
      const auto pair = [&](int c) { return word(c) | static_cast<uint32_t>(word(c + 1)) << 16; };
      __stcs(reinterpret_cast<uint2*>(to), make_uint2(pair(0), pair(2)));
    }
  }
}

// Elements past the end of the bucket read as zero.
__device__ __forceinline__ void load_floats(const float* from, const WorkTile& tile,
                                            float (&x)[kPerThread]) {
  from += static_cast<int64_t>(tile.begin) + 4 * threadIdx.x;
  if (tile.full() && aligned(from, 16)) return load_quads<Float32>(from, x);
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) x[e] = tile.place(e) < tile.size ? from[tile.step(e)] : 0.0f;
}

__device__ __forceinline__ void store_floats(float* to, const WorkTile& tile,
                                             const float (&x)[kPerThread]) {
  to += static_cast<int64_t>(tile.begin) + 4 * threadIdx.x;
  if (tile.full() && aligned(to, 16)) return store_quads<Float32>(to, x);
#pragma unroll
  for (int e = 0; e < kPerThread; ++e)
    if (tile.place(e) < tile.size) to[tile.step(e)] = x[e];
}

// ---------------------------------------------------------------------------------------------
// Tiles of a list of tensors. A tile that holds one tensor's elements alone, aligned, takes wide
// loads and stores. Others (at a tensor's end, or of an unaligned tensor) go element by element,
// still coalesced.
// ---------------------------------------------------------------------------------------------

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

  // How many tensors share the tile.
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
