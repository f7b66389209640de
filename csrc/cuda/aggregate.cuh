// Reads an aggregate. It comes from this library, but a tensor is only bytes, so nothing that it
// says may lead to an access outside it.
#pragma once

#include <cuda_runtime.h>

#include "shared/bucket.h"

namespace gmc::cuda {

// The most entries that an aggregate of so many bytes can have room for; up to three fewer make as
// many bytes. 0 if none has this size.
inline int64_t largest_capacity(int64_t numel, int64_t nbytes) {
  // Eight entries take 16 bytes of indices and 32 of values.
  const int64_t sixteens = (nbytes - AggregateLayout(numel, 0).indices) / 16;
  const int64_t capacity = 4 * (2 * sixteens / 3);
  return AggregateLayout(numel, capacity).nbytes == nbytes ? capacity : 0;
}

// Whether the header is one of an aggregate for numel elements with this largest capacity.
__device__ __forceinline__ bool sound_aggregate(const AggregateHeader& header, int64_t numel,
                                                int64_t largest) {
  return header.tag == kAggregateMagic && header.numel == numel && header.capacity <= largest &&
         largest < header.capacity + int64_t{4};
}

// The layout is computed on the host: as part of a kernel's parameters it takes neither
// instructions nor registers.
struct AggregateSource {
  const uint8_t* data;       // nullptr: there is none
  uint32_t numel, capacity;  // capacity: the largest for its size
  AggregateLayout layout;

  GMC_HD AggregateSource(const Aggregate& aggregate, int64_t numel)
      : data(aggregate.data),
        numel(static_cast<uint32_t>(numel)),
        capacity(static_cast<uint32_t>(largest_capacity(numel, aggregate.nbytes))),
        layout(numel, capacity) {}

  __device__ AggregateView<const uint8_t> view() const { return {data, layout}; }
};

// A place in the list of entries.
struct EntryRange {
  uint32_t begin, count;
};

// What an aggregate says of the entries of one wire tile. The operators have checked that there is
// room for all but the entries, so all of it is loaded together.
struct TileWords {
  AggregateHeader header;
  uint32_t start, count;

  static __device__ TileWords load(const AggregateSource& source, uint32_t tile) {
    const AggregateView<const uint8_t> view = source.view();
    return {*view.header, view.starts[tile], view.counts[tile]};
  }

  // Its entries; none when the aggregate is damaged or not one for this bucket.
  __device__ EntryRange entries(const AggregateSource& source) const {
    bool sound = sound_aggregate(header, source.numel, source.capacity);
    sound &= (header.flags & kDamaged) == 0;
    sound &= int64_t{start} + count <= header.capacity;
    sound &= count <= kTile;
    return {start, sound ? count : 0};
  }
};

// What it says of the entries of one run of 4096 elements.
struct RunWords {
  TileWords tile;
  uint32_t before, after;

  // Each lane of a warp loads one word, into shared memory, because a thread that loaded them all
  // would have no registers for them.
  __device__ void load(const AggregateSource& source, uint32_t run, uint32_t lane) {
    const AggregateView<const uint8_t> view = source.view();
    const uint32_t tile = run / static_cast<uint32_t>(kTileRuns);
    auto* const words = reinterpret_cast<uint32_t*>(this);
    if (lane < 6) {
      const uint32_t* const header = at<uint32_t>(source.data, 0) + lane;
      words[lane] = *(lane < 4 ? header : (lane == 4 ? view.starts : view.counts) + tile);
    } else if (lane < 8) {
      const bool last = lane == 7 && (run + 1) % kTileRuns == 0;
      words[lane] = last ? uint32_t{kTile} : view.runs[run + lane - 6];
    }
  }

  __device__ EntryRange entries(const AggregateSource& source) const {
    const EntryRange all = tile.entries(source);
    const uint32_t begin = min(before, all.count), end = max(begin, min(after, all.count));
    return {all.begin + begin, end - begin};
  }
};
static_assert(sizeof(RunWords) == 32, "a word for each of eight lanes");

}  // namespace gmc::cuda
