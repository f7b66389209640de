// merge sums the payloads of all ranks, in rank order, to one aggregate, one tile at a time in a
// scratch of its size. sparsify and densify convert between an aggregate and a dense tensor.
#include <algorithm>
#include <vector>

#include "aggregate.h"
#include "partition.h"
#include "payload_reader.h"
#include "shared/calls.h"
#include "shared/rule.h"

namespace gmc::cpu {
namespace {

// A tile's sums, and which of its places hold one.
class TileSum {
 public:
  void add(const PayloadEntries& entries, WireType wire) {
    with_wire_type(wire, [&](auto format) { add_as<decltype(format)>(entries); });
  }

  // Writes sum * factor in ascending order and leaves everything zero again. The writer goes by
  // value: through a pointer, its count would go through memory for each entry.
  AggregateTileWriter drain(float factor, AggregateTileWriter out) {
    for (int64_t word = 0; word < kTile / 64; ++word) {
      if (word % (kAggregateRun / 64) == 0) out.begin_run(word / (kAggregateRun / 64));
      for (; present_[word]; present_[word] &= present_[word] - 1) {
        const int64_t i = word * 64 + __builtin_ctzll(present_[word]);
        out.append(i, sum_[i] * factor);
        sum_[i] = 0.0f;
      }
    }
    return out;
  }

 private:
  template <class Format>
  void add_as(const PayloadEntries& entries) {
    for (int64_t entry = 0; entry < entries.count; ++entry) {
      const int64_t i = entries.indices[entry];
      sum_[i] += entries.value<Format>(entry);
      present_[i / 64] |= uint64_t{1} << (i % 64);
    }
  }

  std::vector<float> sum_ = std::vector<float>(kTile);
  std::vector<uint64_t> present_ = std::vector<uint64_t>(kTile / 64);
};

}  // namespace

void run(const MergeCall& call) {
  const Payload& payloads = call.payloads;
  const int64_t ranks = call.ranks;
  const int64_t numel = payloads.shape.numel;
  const int64_t capacity = aggregate_capacity(numel, payloads.shape.k, ranks);
  const AggregateView out(call.aggregate, AggregateLayout(numel, capacity));
  if (call.skip.skipped()) return write_empty(out, numel, capacity);

  std::vector<PayloadReader> readers;
  for (int64_t rank = 0; rank < ranks; ++rank) readers.emplace_back(payloads.of_rank(rank), rank);
  const float factor = mean_factor(ranks);
  const int64_t parts = part_count(numel);
  // This is not for_each_tile_with, because access to the sums through its pointer costs a tenth of
  // the time.
  for_each_part(parts, [&](int64_t part) {
    TileSum sum;
    TileIndices indices;
    const int64_t end = first_tile(part + 1, parts, numel);
    for (int64_t tile = first_tile(part, parts, numel); tile < end; ++tile) {
      int64_t start = 0;
      for (int64_t rank = 0; rank < ranks; ++rank) {
        const PayloadEntries entries = readers[rank].tile(tile, &indices);
        start += entries.start;
        sum.add(entries, payloads.shape.wire);
      }
      AggregateTileWriter writer(out, tile, std::min(start, tile * kTile));
      writer = sum.drain(factor, writer);
      writer.finish();
    }
  });
  *out.header = aggregate_header(numel, capacity, 0);
}

void run(const SparsifyCall& call) {
  const int64_t numel = call.numel;
  const AggregateView out(call.aggregate, AggregateLayout(numel, numel));
  for_each_tile(numel, [&](int64_t tile) {
    AggregateTileWriter writer(out, tile, tile * kTile);
    const float* const values = call.dense + tile * kTile;
    const int64_t size = tile_size(numel, tile);
    for (int64_t run = 0; run < kTileRuns; ++run) {
      writer.begin_run(run);
      for (int64_t i = run * kAggregateRun; i < std::min((run + 1) * kAggregateRun, size); ++i)
        if (values[i] != 0.0f) writer.append(i, values[i]);
    }
    writer.finish();
  });
  *out.header = aggregate_header(numel, numel, 0);
}

void run(const DensifyCall& call) {
  const int64_t numel = call.numel;
  std::fill_n(call.dense, numel, 0.0f);
  for (int64_t tile = 0; tile < tile_count(numel); ++tile) {
    const AggregateEntries entries = aggregate_entries(call.aggregate.data, numel, tile);
    for (int64_t i = 0; i < entries.count; ++i)
      call.dense[tile * kTile + entries.indices[i]] = entries.values[i];
  }
}

}  // namespace gmc::cpu
