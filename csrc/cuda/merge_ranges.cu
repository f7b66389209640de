// merge_ranges: payloads of the ranges of a bucket, side by side, to one aggregate.
//
// A block owns one wire tile of the bucket, in which pieces of one or more payloads' tiles lie. An
// entry's place in the aggregate is its number in its payload and the entries of the ranges before,
// so the block needs no prefix sum. A payload's tile that lies in two tiles of the bucket is opened
// by both blocks.
#include "block.cuh"
#include "launch.h"
#include "payload_reader.cuh"
#include "shared/calls.h"

namespace gmc::cuda {
namespace {

struct MergeRangesArgs {
  PayloadSource full, last;
  int64_t ranges, numel, capacity;
  Skip skip;
  AggregateView<uint8_t> out;
};

struct MergeRangesShared {
  PayloadPiece piece;
  // The payload's entries before each run of the bucket's tile, and before its end.
  uint32_t below[kTileRuns + 1];
};

// How many of a piece's entries have an index below i.
__device__ __forceinline__ uint32_t entries_below(const PayloadPiece& piece, int64_t i) {
  uint32_t low = 0, high = piece.count;
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if (piece.index(middle) < i) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class Format>
__global__ void __launch_bounds__(kThreads)
    merge_ranges_kernel(const __grid_constant__ MergeRangesArgs args) {
  static __shared__ MergeRangesShared shared;
  const int64_t tile = blockIdx.x, first = tile * kTile;
  const int64_t end = first + tile_size(args.numel, tile);
  const AggregateView<uint8_t>& out = args.out;
  AggregateHeader* const header = out.header;  // zero so far
  const bool skipped = args.skip.skipped();
  if (tile == 0 && threadIdx.x == 0) {
    header->tag = kAggregateMagic;
    header->capacity = static_cast<uint32_t>(args.capacity);
    header->numel = static_cast<uint32_t>(args.numel);
    if (skipped) atomicOr(&header->flags, kNonfinite);
  }
  if (skipped) {
    if (threadIdx.x == 0) out.starts[tile] = out.counts[tile] = 0;
    return;
  }

  const int64_t width = args.full.payload.shape.numel;
  int64_t start = 0;     // of this tile's entries in the aggregate
  uint32_t written = 0;  // how many there are so far
  for (int64_t range = first / width; range < args.ranges && range * width < end; ++range) {
    const bool is_last = range + 1 == args.ranges;
    const PayloadSource& source = is_last ? args.last : args.full;
    const int64_t begin = range * width, numel = source.payload.shape.numel;
    const int64_t stop = min(end - begin, numel);
    for (int64_t part = max(first - begin, int64_t{0}) / kTile; part * kTile < stop; ++part) {
      const int64_t offset = begin + part * kTile - first;  // of its tile from the bucket's
      const auto size = static_cast<uint32_t>(tile_size(numel, part));
      const int64_t before = range * args.full.payload.shape.k;  // entries of other ranges
      PayloadPiece& piece = shared.piece;
      const auto count_below = [&](bool is_first) {
        for (int run = threadIdx.x; run <= kTileRuns; run += kThreads)
          shared.below[run] = (is_first ? piece.first : shared.below[run]) +
                              entries_below(piece, run * kAggregateRun - offset);
      };
      const auto copy = [&](uint32_t i) {
        const uint32_t number = piece.first + i;
        if (number < shared.below[0] || number >= shared.below[kTileRuns]) return;
        out.indices[before + number] = static_cast<uint16_t>(offset + piece.index(i));
        out.values[before + number] = add(piece.value<Format>(i), 0.0f);  // no -0
      };
      if (!read_tile<Format>(source, is_last ? 0 : range, part, part == 0, &piece, count_below,
                             copy)) {
        if (threadIdx.x == 0) {
          atomicOr(&header->flags, kDamaged);
          out.starts[tile] = out.counts[tile] = 0;
        }
        return;
      }
      const uint32_t from = shared.below[0], to = shared.below[kTileRuns];
      if (written == 0) start = before + from;
      for (int run = threadIdx.x; run < kTileRuns; run += kThreads) {
        const int64_t place = run * kAggregateRun;
        if (place >= offset && place < offset + size)
          out.runs[tile * kTileRuns + run] =
              static_cast<uint16_t>(written + shared.below[run] - from);
      }
      written += to - from;
    }
  }
  for (int run = threadIdx.x; run < kTileRuns; run += kThreads)
    if (first + run * kAggregateRun >= end)
      out.runs[tile * kTileRuns + run] = static_cast<uint16_t>(written);
  if (threadIdx.x == 0) {
    out.starts[tile] = static_cast<uint32_t>(start);
    out.counts[tile] = written;
  }
}

}  // namespace

void run(const MergeRangesCall& call, const Stream& stream) {
  // Blocks that find damage set a flag in the header, whichever of them runs first.
  check(cudaMemsetAsync(call.aggregate, 0, sizeof(AggregateHeader), stream.stream));
  const Ranges& ranges = call.ranges;
  const int64_t numel = ranges.numel(), capacity = ranges.entries();
  const AggregateView out(call.aggregate, AggregateLayout(numel, capacity));
  const MergeRangesArgs args{PayloadSource({call.payloads, ranges.full}),
                             PayloadSource(ranges.payload(call.payloads, ranges.count - 1)),
                             ranges.count,
                             numel,
                             capacity,
                             call.skip,
                             out};
  with_wire_type(ranges.full.wire, [&](auto format) {
    launch(merge_ranges_kernel<decltype(format)>, tile_count(numel), kThreads, stream, args);
  });
}

}  // namespace gmc::cuda
