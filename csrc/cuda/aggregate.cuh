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
  const auto* header = reinterpret_cast<const AggregateHeader*>(aggregate.data);
  const int64_t capacity = header->capacity;
  const AggregateLayout layout(numel, capacity);
  if (header->tag != kAggregateMagic || (header->flags & kDamaged) != 0 || header->numel != numel ||
      layout.nbytes != aggregate.nbytes)
    return {nullptr, nullptr, 0};
  const int64_t start = reinterpret_cast<const uint32_t*>(aggregate.data + layout.starts)[tile];
  const int64_t count = reinterpret_cast<const uint32_t*>(aggregate.data + layout.counts)[tile];
  if (start + count > capacity || count > kTile) return {nullptr, nullptr, 0};
  return {reinterpret_cast<const uint16_t*>(aggregate.data + layout.indices) + start,
          reinterpret_cast<const float*>(aggregate.data + layout.values) + start,
          static_cast<uint32_t>(count)};
}

}  // namespace gmc::cuda
