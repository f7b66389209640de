// Reads an aggregate. It comes from this library, but a tensor is only bytes, so nothing that it
// says may lead to an access outside it.
#pragma once

#include <cuda_runtime.h>

#include "shared/bucket.h"

namespace gmc::cuda {

struct AggregateEntries {
  const uint16_t* indices;
  const float* values;
  uint32_t count;
};

// The entries of a wire tile; none when the aggregate is damaged or not one for numel elements. The
// operators have checked that there is room for all but the entries, so the tile's place is loaded
// together with the header.
__device__ __forceinline__ AggregateEntries aggregate_entries(const Aggregate& aggregate,
                                                              int64_t numel, int64_t tile) {
  if (!aggregate.data) return {nullptr, nullptr, 0};
  const AggregateHeader header = *at<AggregateHeader>(aggregate.data, 0);
  const AggregateLayout without_entries(numel, 0);
  const int64_t start = at<uint32_t>(aggregate.data, without_entries.starts)[tile];
  const int64_t count = at<uint32_t>(aggregate.data, without_entries.counts)[tile];
  const int64_t capacity = header.capacity;
  if ((header.flags & kDamaged) != 0 || !sound_aggregate(header, numel, aggregate.nbytes) ||
      start + count > capacity || count > kTile)
    return {nullptr, nullptr, 0};
  const AggregateView view(aggregate.data, AggregateLayout(numel, capacity));
  return {view.indices + start, view.values + start, static_cast<uint32_t>(count)};
}

// The entries of one run of 4096 elements.
__device__ __forceinline__ AggregateEntries aggregate_run(const Aggregate& aggregate, int64_t numel,
                                                          int64_t run) {
  if (!aggregate.data) return {nullptr, nullptr, 0};
  const uint16_t* const runs = at<uint16_t>(aggregate.data, AggregateLayout(numel, 0).runs);
  const uint32_t before = runs[run];
  const uint32_t after = (run + 1) % kTileRuns != 0 ? runs[run + 1] : uint32_t{kTile};
  const AggregateEntries tile = aggregate_entries(aggregate, numel, run / kTileRuns);
  const uint32_t begin = before < tile.count ? before : tile.count;
  const uint32_t last = after < tile.count ? after : tile.count;
  const uint32_t end = begin < last ? last : begin;
  return {tile.indices + begin, tile.values + begin, end - begin};
}

}  // namespace gmc::cuda
