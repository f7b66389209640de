// Reading and writing an aggregate tile by tile.
#pragma once

#include "../payload.h"

namespace gmc::cpu {

struct AggregateEntries {
  const uint16_t* indices;
  const float* values;
  int64_t count;
};

inline AggregateEntries aggregate_entries(const uint8_t* aggregate, int64_t numel, int64_t tile) {
  const auto* header = reinterpret_cast<const AggregateHeader*>(aggregate);
  const AggregateLayout layout(numel, header->capacity);
  const uint32_t start = reinterpret_cast<const uint32_t*>(aggregate + layout.starts)[tile];
  const uint32_t count = reinterpret_cast<const uint32_t*>(aggregate + layout.counts)[tile];
  return {reinterpret_cast<const uint16_t*>(aggregate + layout.indices) + start,
          reinterpret_cast<const float*>(aggregate + layout.values) + start, count};
}

// Writes one tile's entries in ascending order, from `start` on; finish() ends it.
class AggregateTileWriter {
 public:
  AggregateTileWriter(uint8_t* aggregate, int64_t numel, int64_t capacity, int64_t tile,
                      int64_t start) {
    const AggregateLayout layout(numel, capacity);
    count_ = reinterpret_cast<uint32_t*>(aggregate + layout.counts) + tile;
    indices_ = reinterpret_cast<uint16_t*>(aggregate + layout.indices) + start;
    values_ = reinterpret_cast<float*>(aggregate + layout.values) + start;
    reinterpret_cast<uint32_t*>(aggregate + layout.starts)[tile] = static_cast<uint32_t>(start);
  }

  void append(int64_t local_index, float value) {
    indices_[written_] = static_cast<uint16_t>(local_index);
    values_[written_] = value;
    ++written_;
  }

  void finish() const { *count_ = static_cast<uint32_t>(written_); }

 private:
  uint32_t* count_;
  uint16_t* indices_;
  float* values_;
  int64_t written_ = 0;
};

}  // namespace gmc::cpu
