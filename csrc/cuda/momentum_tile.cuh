// Global momentum: beta * a, injected into a work tile from the sparse aggregate.
#pragma once

#include "aggregate.cuh"
#include "tile.cuh"

namespace gmc::cuda {

// x += beta * a. The tile's entries are one run of its wire tile's. Every thread probes one place
// of those; the count of probes that lie before the tile says where to begin, one step of probes
// too early at most. `stage` is kWorkTile floats of shared memory.
__device__ __forceinline__ void add_global_momentum(const Aggregate& aggregate, float momentum,
                                                    int64_t numel, const WorkTile& tile,
                                                    float* stage, float (&x)[kPerThread]) {
  const AggregateEntries entries = aggregate_entries(aggregate, numel, tile.begin / kTile);
  if (entries.count == 0) return;
  const uint32_t begin = tile.begin % kTile;
  const auto probe = [&](uint32_t number) { return entries.count * number / kThreads; };
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) stage[tile.place(e)] = 0.0f;
  const int before = __syncthreads_count(entries.indices[probe(threadIdx.x)] < begin);
  uint32_t entry = (before ? probe(before - 1) : 0) + threadIdx.x;
  for (; entry < entries.count; entry += kThreads) {
    const uint32_t place = entries.indices[entry] - begin;  // huge when the entry lies before
    if (place < kWorkTile) {
      stage[place] = __fmul_rn(momentum, entries.values[entry]);
    } else if (static_cast<int32_t>(place) > 0) {
      break;
    }
  }
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) x[e] = __fadd_rn(x[e], stage[tile.place(e)]);
}

}  // namespace gmc::cuda
