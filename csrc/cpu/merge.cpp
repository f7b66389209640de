// merge: the payloads of all ranks to one aggregate, summed in rank order; sparsify and densify
// between an aggregate and a dense tensor. One tile at a time, in a scratch of its size.
#include <algorithm>
#include <cstring>
#include <vector>

#include "aggregate.h"
#include "kernels.h"
#include "partition.h"
#include "payload_reader.h"

namespace gmc::cpu {
namespace {

// A tile's sums, and which of its places hold one.
class TileSum {
 public:
  void add(const PayloadEntries& entries, DType wire) {
    switch (wire) {
      case DType::kBFloat16:
        return add_as<DType::kBFloat16>(entries);
      case DType::kFloat16:
        return add_as<DType::kFloat16>(entries);
      default:
        return add_as<DType::kFloat32>(entries);
    }
  }

  // Writes sum * factor in ascending order and leaves everything zero again. The writer goes by
  // value: through a pointer, its count would go through memory for each entry.
  AggregateTileWriter drain(float factor, AggregateTileWriter out) {
    for (int64_t word = 0; word < kTile / 64; ++word) {
      for (; present_[word]; present_[word] &= present_[word] - 1) {
        const int64_t i = word * 64 + __builtin_ctzll(present_[word]);
        out.append(i, sum_[i] * factor);
        sum_[i] = 0.0f;
      }
    }
    return out;
  }

 private:
  template <DType wire>
  void add_as(const PayloadEntries& entries) {
    for (int64_t entry = 0; entry < entries.count; ++entry) {
      const int64_t i = entries.indices[entry];
      sum_[i] += load_value(entries.values, wire, entry);
      present_[i / 64] |= uint64_t{1} << (i % 64);
    }
  }

  std::vector<float> sum_ = std::vector<float>(kTile);
  std::vector<uint64_t> present_ = std::vector<uint64_t>(kTile / 64);
};

void write_header(uint8_t* aggregate, int64_t numel, int64_t capacity, uint32_t flags) {
  const AggregateHeader header{kAggregateMagic, flags, static_cast<uint32_t>(capacity),
                               static_cast<uint32_t>(numel)};
  std::memcpy(aggregate, &header, sizeof header);
}

void write_empty(uint8_t* aggregate, int64_t numel, int64_t capacity) {
  const AggregateLayout layout(numel, capacity);
  write_header(aggregate, numel, capacity, kNonfinite);
  std::memset(aggregate + layout.starts, 0, layout.indices - layout.starts);
}

}  // namespace

void merge(const PayloadArgs& payloads, int64_t ranks, bool skip, uint8_t* aggregate) {
  const int64_t numel = payloads.numel;
  const int64_t capacity = aggregate_capacity(numel, payloads.k, ranks);
  if (skip) return write_empty(aggregate, numel, capacity);

  std::vector<PayloadReader> readers;
  for (int64_t rank = 0; rank < ranks; ++rank) readers.emplace_back(payloads, rank);
  const float factor = static_cast<float>(1.0 / static_cast<double>(ranks));
  const int64_t parts = part_count(numel);
  for_each_part(parts, [&](int64_t part) {
    TileSum sum;
    const int64_t end = first_tile(part + 1, parts, numel);
    for (int64_t tile = first_tile(part, parts, numel); tile < end; ++tile) {
      int64_t start = 0;
      for (int64_t rank = 0; rank < ranks; ++rank) {
        const PayloadEntries entries = readers[rank].tile(tile);
        start += entries.start;
        sum.add(entries, payloads.wire);
      }
      AggregateTileWriter out(aggregate, numel, capacity, tile, std::min(start, tile * kTile));
      out = sum.drain(factor, out);
      out.finish();
    }
  });
  write_header(aggregate, numel, capacity, 0);
}

void sparsify(const float* dense, int64_t numel, uint8_t* aggregate) {
  const int64_t parts = part_count(numel);
  for_each_part(parts, [&](int64_t part) {
    const int64_t end = first_tile(part + 1, parts, numel);
    for (int64_t tile = first_tile(part, parts, numel); tile < end; ++tile) {
      AggregateTileWriter out(aggregate, numel, numel, tile, tile * kTile);
      for (int64_t i = tile * kTile; i < tile_end(tile, numel); ++i)
        if (dense[i] != 0.0f) out.append(i - tile * kTile, dense[i]);
      out.finish();
    }
  });
  write_header(aggregate, numel, numel, 0);
}

void densify(const uint8_t* aggregate, int64_t numel, float* dense) {
  std::fill_n(dense, numel, 0.0f);
  for (int64_t tile = 0; tile < tile_count(numel); ++tile) {
    const AggregateEntries entries = aggregate_entries(aggregate, numel, tile);
    for (int64_t i = 0; i < entries.count; ++i)
      dense[tile * kTile + entries.indices[i]] = entries.values[i];
  }
}

}  // namespace gmc::cpu
