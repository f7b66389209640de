// Reading an aggregate. It comes from this library, but a tensor is only bytes: nothing that it
// says leads to an access outside it.
#pragma once

#include <cuda_runtime.h>

#include "payload.h"

namespace gmc::cuda {

struct Aggregate {
  const uint8_t* data;  // nullptr: there is none
  int64_t nbytes;
};

struct AggregateEntries {
  const uint16_t* indices;
  const float* values;
  uint32_t count;
};

// The entries of a wire tile; none when the aggregate is damaged or not one for numel elements.
__device__ __forceinline__ AggregateEntries aggregate_entries(const Aggregate& aggregate,
                                                              int64_t numel, int64_t tile) {
  if (!aggregate.data) return {nullptr, nullptr, 0};
  const AggregateHeader& header = *at<AggregateHeader>(aggregate.data, 0);
  if ((header.flags & kDamaged) != 0 || !sound_aggregate(header, numel, aggregate.nbytes))
    return {nullptr, nullptr, 0};
  const int64_t capacity = header.capacity;
  const AggregateView view(aggregate.data, AggregateLayout(numel, capacity));
  const int64_t start = view.starts[tile];
  const int64_t count = view.counts[tile];
  if (start + count > capacity || count > kTile) return {nullptr, nullptr, 0};
  return {view.indices + start, view.values + start, static_cast<uint32_t>(count)};
}

}  // namespace gmc::cuda
