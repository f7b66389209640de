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
  uint32_t position[kWarps][kQuads];  // of a warp's first candidate in each quad
  uint32_t end;
};

// Where a thread's candidates go.
struct Compaction {
  const uint32_t* warp_position;
  uint32_t before;  // candidates of the warp's threads before this one: a byte for each quad
  bool stored;      // the tile's candidates found room

  // The position of the thread's first candidate in a quad.
  __device__ uint32_t position(int quad) const {
    return warp_position[quad] + (before >> (8 * quad) & 0xffu);
  }
};

// Appends the tile's candidates in index order: one atomic per tile. Every thread of the block
// calls it.
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
  if (warp_id() == 0) {
    // Each lane stands for a warp. Sums over warps need 16 bits: quads 0 and 2 in one word, 1 and 3
    // in the other.
    const uint32_t own = lane_id() < kWarps ? shared->warp_counts[lane_id()] : 0;
    const uint32_t even = own & 0x00ff00ffu, odd = own >> 8 & 0x00ff00ffu;
    const uint32_t evens = warp_inclusive_sum(even), odds = warp_inclusive_sum(odd);
    const uint32_t all_evens = __shfl_sync(kAllLanes, evens, 31);
    const uint32_t all_odds = __shfl_sync(kAllLanes, odds, 31);
    const uint32_t quad1 = all_evens & 0xffffu, quad2 = quad1 + (all_odds & 0xffffu);
    const uint32_t quad3 = quad2 + (all_evens >> 16), total = quad3 + (all_odds >> 16);
    uint32_t offset = 0;
    if (lane_id() == 0) {
      if (total) offset = atomicAdd(counter, total);
      workspace.tiles[tile.number] = make_uint2(offset, total);
      shared->end = offset + total;
    }
    offset = __shfl_sync(kAllLanes, offset, 0);
    if (lane_id() < kWarps) {
      uint32_t* const position = shared->position[lane_id()];
      position[0] = offset + (evens - even & 0xffffu);
      position[1] = offset + quad1 + (odds - odd & 0xffffu);
      position[2] = offset + quad2 + (evens - even >> 16);
      position[3] = offset + quad3 + (odds - odd >> 16);
    }
  }
  __syncthreads();
  return {shared->position[warp_id()], inclusive - counts, shared->end <= workspace.capacity};
}

__device__ __forceinline__ uint32_t bin_of(uint32_t key, uint32_t base) {
  const uint32_t bin = (key - base) >> kBinBits;
  return bin < kBins - 1 ? bin : kBins - 1;
}

// Stores the candidates of `mask` where `reserve` said, counts them in `bins`, and leaves in x what
// left(value) says stays of each. It goes one by one, through the thread's own places of stage
// (kWorkTile floats of shared memory), because most threads have none, and 16 copies of it would
// cost registers. Every thread of a warp calls it.
template <class Left>
__device__ __forceinline__ void store_candidates(const WorkTile& tile, uint32_t mask, uint32_t base,
                                                 const Compaction& compaction,
                                                 const Workspace& workspace, uint32_t* bins,
                                                 float* stage, float (&x)[kPerThread],
                                                 const Left& left) {
  uint32_t beyond = 0;  // of the last bin, whose one address may be that of most candidates
  if (mask != 0) {
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) stage[tile.place(e)] = x[e];
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
      const int e = __ffs(rest) - 1, quad = e / 4;
      float* const staged = &stage[tile.place(e)];
      const float value = *staged;
      const uint32_t before = __popc(mask & ((1u << e) - 1) & ~0u << (4 * quad));
      const uint32_t position = compaction.position(quad) + before;
      workspace.candidates[position] = make_uint2(tile.begin + tile.place(e), float_bits(value));
      const uint32_t bin = bin_of(magnitude_key(value), base);
      if (bin < kBins - 1) atomicAdd(&bins[bin], 1u);
      beyond += bin == kBins - 1;
      *staged = left(value);
    }
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) x[e] = stage[tile.place(e)];
  }
  add_to_counter(&bins[kBins - 1], beyond);
}

}  // namespace gmc::cuda
