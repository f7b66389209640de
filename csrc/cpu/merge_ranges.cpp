// merge_ranges: payloads of the ranges of a bucket, side by side, to one aggregate.
#include <algorithm>
#include <optional>
#include <vector>

#include "aggregate.h"
#include "partition.h"
#include "payload_reader.h"
#include "shared/calls.h"

namespace gmc::cpu {
namespace {

// The entries of one tile of a range's payload, and where they lie in the bucket.
struct Piece {
  PayloadEntries entries;
  int64_t offset;  // of the payload's tile from the bucket's tile
  int64_t before;  // entries of the ranges before

  // How many of the entries lie before element i of the bucket's tile.
  int64_t below(int64_t i) const {
    const auto* const end = entries.indices + entries.count;
    return std::partition_point(entries.indices, end,
                                [&](uint16_t index) { return offset + index < i; }) -
           entries.indices;
  }
};

// Calls function(piece) for what lies in a tile of the bucket, in order.
template <class Function>
void for_each_piece(const Ranges& ranges, const std::vector<PayloadReader>& readers, int64_t tile,
                    TileIndices* indices, const Function& function) {
  const int64_t first = tile * kTile, end = first + tile_size(ranges.numel(), tile);
  for (int64_t range = first / ranges.width(); range < ranges.count && range * ranges.width() < end;
       ++range) {
    const int64_t begin = range * ranges.width();
    const int64_t numel = ranges.shape(range).numel;
    const int64_t last = (std::min(end - begin, numel) - 1) / kTile;
    for (int64_t part = std::max(first - begin, int64_t{0}) / kTile; part <= last; ++part)
      function(Piece{readers[range].tile(part, indices), begin + part * kTile - first,
                     range * ranges.full.k});
  }
}

}  // namespace

void run(const MergeRangesCall& call) {
  const Ranges& ranges = call.ranges;
  const int64_t numel = ranges.numel(), capacity = ranges.entries();
  const AggregateView out(call.aggregate, AggregateLayout(numel, capacity));
  if (call.skip.skipped()) return write_empty(out, numel, capacity);

  std::vector<PayloadReader> readers;
  for (int64_t range = 0; range < ranges.count; ++range)
    readers.emplace_back(ranges.payload(call.payloads, range), range);
  for_each_tile_with<TileIndices>(numel, [&](int64_t tile, TileIndices* indices) {
    std::optional<AggregateTileWriter> writer;
    int64_t run = 0;
    for_each_piece(ranges, readers, tile, indices, [&](const Piece& piece) {
      const int64_t from = piece.below(0), to = piece.below(kTile);
      if (!writer) writer.emplace(out, tile, piece.before + piece.entries.start + from);
      with_wire_type(ranges.full.wire, [&](auto format) {
        for (int64_t entry = from; entry < to; ++entry) {
          const int64_t i = piece.offset + piece.entries.indices[entry];
          for (; run <= i / kAggregateRun; ++run) writer->begin_run(run);
          // -0 becomes +0, as in a sum.
          writer->append(i, piece.entries.value<decltype(format)>(entry) + 0.0f);
        }
      });
    });
    for (; run < kTileRuns; ++run) writer->begin_run(run);
    writer->finish();
  });
  *out.header = aggregate_header(numel, capacity, 0);
}

}  // namespace gmc::cpu
