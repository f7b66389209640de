// The candidates of a work tile: found, counted, put aside and taken out of memory.
#pragma once

#include "block.cuh"
#include "tile.cuh"
#include "workspace.h"

namespace gmc::cuda {

// Compares magnitudes as floats instead of keys: the absolute value costs no instruction and,
// unlike 16 keys, no registers.
__device__ __forceinline__ bool reaches(float x, uint32_t threshold) {
  return fabsf(x) >= bits_float(threshold);
}

// Bit e of the result: element e lies in the bucket, and its magnitude reaches the threshold, a
// key.
__device__ __forceinline__ uint32_t reaching(const WorkTile& tile, const float (&x)[kPerThread],
                                             uint32_t threshold) {
  uint32_t mask = 0;
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) mask |= static_cast<uint32_t>(reaches(x[e], threshold)) << e;
  if (!tile.full()) {
#pragma unroll
    for (int e = 0; e < kPerThread; ++e)
      if (tile.place(e) >= tile.size) mask &= ~(1u << e);
  }
  return mask;
}

struct CompactShared {
  uint32_t warp_counts[kWarps];
  uint32_t offset;
};

// Appends the tile's candidates in index order: one atomic per tile. Every thread of the block
// calls it. Returns whether this tile's candidates found room; `position` says where this thread's
// quads begin.
struct Compaction {
  uint32_t position[kQuads];
  bool stored;
};

__device__ __forceinline__ Compaction reserve(const WorkTile& tile, uint32_t mask,
                                              uint32_t* counter, const Workspace& workspace,
                                              CompactShared* shared) {
  // One byte per quad: a warp's quad has at most 128 candidates.
  uint32_t counts = 0;
#pragma unroll
  for (int q = 0; q < kQuads; ++q)
    counts |= static_cast<uint32_t>(__popc(mask >> (4 * q) & 0xfu)) << (8 * q);
  const uint32_t inclusive = warp_inclusive_sum(counts);
  if (lane_id() == 31) shared->warp_counts[warp_id()] = inclusive;
  __syncthreads();
  // Sums over warps need 16 bits: quads 0 and 2 in one word, 1 and 3 in the other.
  uint32_t even_before = 0, odd_before = 0, even = 0, odd = 0;
#pragma unroll
  for (unsigned warp = 0; warp < kWarps; ++warp) {
    const uint32_t word = shared->warp_counts[warp];
    if (warp == warp_id()) {
      even_before = even;
      odd_before = odd;
    }
    even += word & 0x00ff00ffu;
    odd += word >> 8 & 0x00ff00ffu;
  }
  const uint32_t quad1 = even & 0xffffu, quad2 = quad1 + (odd & 0xffffu);
  const uint32_t quad3 = quad2 + (even >> 16), total = quad3 + (odd >> 16);
  if (threadIdx.x == 0) {
    const uint32_t offset = total ? atomicAdd(counter, total) : 0;
    workspace.tiles[tile.number] = make_uint2(offset, total);
    shared->offset = offset;
  }
  __syncthreads();
  const uint32_t offset = shared->offset;
  const uint32_t before = inclusive - counts;
  return {{offset + (even_before & 0xffffu) + (before & 0xffu),
           offset + quad1 + (odd_before & 0xffffu) + (before >> 8 & 0xffu),
           offset + quad2 + (even_before >> 16) + (before >> 16 & 0xffu),
           offset + quad3 + (odd_before >> 16) + (before >> 24)},
          offset + total <= workspace.capacity};
}

__device__ __forceinline__ uint32_t bin_of(uint32_t key, uint32_t base) {
  const uint32_t bin = (key - base) >> kBinBits;
  return bin < kBins - 1 ? bin : kBins - 1;
}

// Leaves in x what stays in memory of the elements in `mask` if they are sent. It goes one by one,
// through the thread's own places of stage (kWorkTile floats of shared memory), because most
// threads have none, and 16 copies of every wire type's rounding would cost registers.
__device__ __forceinline__ void take_out(const WorkTile& tile, uint32_t mask, WireType wire,
                                         int scale, float* stage, float (&x)[kPerThread]) {
  if (mask == 0) return;
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) stage[tile.place(e)] = x[e];
  for (; mask; mask &= mask - 1) {
    float& value = stage[tile.place(__ffs(mask) - 1)];
    value = with_wire_type(
        wire, [&](auto format) { return left_behind<decltype(format)>(value, scale); });
  }
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) x[e] = stage[tile.place(e)];
}

// Stores the candidates of `mask` where `reserve` said, and counts them in `bins`.
__device__ __forceinline__ void store_candidates(const WorkTile& tile, uint32_t mask,
                                                 const float (&x)[kPerThread], uint32_t base,
                                                 const Compaction& compaction,
                                                 const Workspace& workspace, uint32_t* bins) {
  if (!compaction.stored || mask == 0) return;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    uint32_t position = compaction.position[q];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int e = 4 * q + c;
      if (!(mask >> e & 1)) continue;
      workspace.candidates[position++] = make_uint2(tile.begin + tile.place(e), float_bits(x[e]));
      atomicAdd(&bins[bin_of(magnitude_key(x[e]), base)], 1u);
    }
  }
}

}  // namespace gmc::cuda
