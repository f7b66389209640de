// Reading and writing an aggregate tile by tile.
#pragma once

#include <algorithm>

#include "shared/payload.h"

namespace gmc::cpu {

struct AggregateEntries {
  const uint16_t* indices;
  const float* values;
  int64_t count;
};

inline AggregateEntries aggregate_entries(const uint8_t* aggregate, int64_t numel, int64_t tile) {
  const int64_t capacity = at<AggregateHeader>(aggregate, 0)->capacity;
  const AggregateView view(aggregate, AggregateLayout(numel, capacity));
  const uint32_t start = view.starts[tile];
  return {view.indices + start, view.values + start, view.counts[tile]};
}

inline AggregateHeader aggregate_header(int64_t numel, int64_t capacity, uint32_t flags) {
  return {kAggregateMagic, flags, static_cast<uint32_t>(capacity), static_cast<uint32_t>(numel)};
}

// The aggregate of a step that is skipped.
inline void write_empty(const AggregateView<uint8_t>& out, int64_t numel, int64_t capacity) {
  *out.header = aggregate_header(numel, capacity, kNonfinite);
  std::fill_n(out.starts, tile_count(numel), 0u);
  std::fill_n(out.counts, tile_count(numel), 0u);
}

// Writes one tile's entries in ascending order, from `start` on: begin_run() comes before the
// entries of each of its runs, finish() after the last.
class AggregateTileWriter {
 public:
  AggregateTileWriter(const AggregateView<uint8_t>& out, int64_t tile, int64_t start)
      : count_(out.counts + tile),
        runs_(out.runs + tile * kTileRuns),
        indices_(out.indices + start),
        values_(out.values + start) {
    out.starts[tile] = static_cast<uint32_t>(start);
  }

  void begin_run(int64_t run) const { runs_[run] = static_cast<uint16_t>(written_); }

  void append(int64_t local_index, float value) {
    indices_[written_] = static_cast<uint16_t>(local_index);
    values_[written_] = value;
    ++written_;
  }

  void finish() const { *count_ = static_cast<uint32_t>(written_); }

 private:
  uint32_t* count_;
  uint16_t* runs_;
  uint16_t* indices_;
  float* values_;
  int64_t written_ = 0;
};

}  // namespace gmc::cpu
