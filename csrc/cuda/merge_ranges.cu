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
  PayloadTile tile;
  uint32_t below[kTileRuns + 1];  // entries before each run of the bucket's tile, and its end
};

// How many of a tile's entries have an index below i.
__device__ __forceinline__ uint32_t entries_below(const PayloadTile& tile, int64_t i) {
  if (i <= 0) return 0;
  const int64_t block = i / kBlock;
  if (block >= tile.blocks)
    return tile.blocks == 0 ? 0 : tile.begins[tile.blocks - 1] + tile.length(tile.blocks - 1);
  uint32_t entry = tile.begins[block];
  for (const uint32_t end = entry + tile.length(block); entry < end; ++entry)
    if (tile.low_byte(entry) >= i % kBlock) break;
  return entry;
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
  bool sound = true;
  for (int64_t range = first / width; range < args.ranges && range * width < end; ++range) {
    const bool is_last = range + 1 == args.ranges;
    const PayloadSource& source = is_last ? args.last : args.full;
    const int64_t begin = range * width, numel = source.payload.shape.numel;
    const int64_t stop = min(end - begin, numel);
    for (int64_t part = max(first - begin, int64_t{0}) / kTile; part * kTile < stop; ++part) {
      const int64_t offset = begin + part * kTile - first;  // of its tile from the bucket's
      const auto size = static_cast<uint32_t>(tile_size(numel, part));
      __syncthreads();  // the tile before was read
      if (warp_id() == 0)
        sound &= open_tile(source, is_last ? 0 : range, part, part == 0, &shared.tile);
      __syncthreads();
      const PayloadTile& payload = shared.tile;
      payload.for_each<kThreads>([&](uint32_t entry, uint32_t index, bool follows) {
        sound &= payload.sound<Format>(entry, index, follows, size);
      });
      for (int run = threadIdx.x; run <= kTileRuns; run += kThreads)
        shared.below[run] = entries_below(payload, run * kAggregateRun - offset);
      if (__syncthreads_or(!sound)) {
        if (threadIdx.x == 0) {
          atomicOr(&header->flags, kDamaged);
          out.starts[tile] = out.counts[tile] = 0;
        }
        return;
      }
      const uint32_t from = shared.below[0], to = shared.below[kTileRuns];
      const int64_t number = range * args.full.payload.shape.k + payload.start;  // of entry 0
      if (written == 0) start = number + from;
      for (int run = threadIdx.x; run < kTileRuns; run += kThreads) {
        const int64_t place = run * kAggregateRun;
        if (place >= offset && place < offset + size)
          out.runs[tile * kTileRuns + run] =
              static_cast<uint16_t>(written + shared.below[run] - from);
      }
      payload.for_each<kThreads>([&](uint32_t entry, uint32_t index, bool) {
        if (entry < from || entry >= to) return;
        out.indices[number + entry] = static_cast<uint16_t>(offset + index);
        out.values[number + entry] = add(payload.value<Format>(entry), 0.0f);  // no -0
      });
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
