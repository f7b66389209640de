// merge: the payloads of all ranks to one aggregate, summed in rank order, without float atomics.
//
// A block owns one wire tile. Each warp opens it in one rank's payload. The block then loads the
// entries of several ranks at once, checks them in registers and marks in a bitmap which elements
// any rank sent. A prefix over the bitmap's words gives each of them its place in the merged list.
// One window of that list at a time is then summed in shared memory, rank after rank, from the same
// registers. The list is far shorter than the tile, so that one window usually holds all of it.
#include <algorithm>

#include "block.cuh"
#include "launch.h"
#include "payload_reader.cuh"
#include "shared/calls.h"

namespace gmc::cuda {
namespace {

constexpr int kWords = kTile / 32;
constexpr int kRunWords = static_cast<int>(kAggregateRun) / 32;
constexpr int kWordsEach = kWords / kMergeThreads;
static_assert(kWords % kMergeThreads == 0, "each thread has as many words of the bitmap");

// How many ranks' entries of a tile are in registers at once, and how many of each rank in one
// thread. At 1 % two threads have 2.6 on average; what is more comes from the first-level cache,
// one after the other.
template <class Format>
constexpr int kHeldRanks = std::min(Format::kBits > 16 ? 4 : 8, kMergeWarps);
constexpr int kHeld = 2;

template <class Format>
using HeldEntries = PackedEntry<Format>[kHeldRanks<Format>][kHeld];

struct MergeArgs {
  PayloadSource source;
  uint32_t ranks;
  const int32_t* skip;
  AggregateView<uint8_t> out;
  int64_t capacity;
  float factor;  // 1 / ranks
};

template <class Format>
struct MergeShared {
  uint32_t present[kWords];
  uint16_t before[kWords];  // entries in the words before
  float sum[kMergeWindow];
  uint32_t warp_sums[kMergeWarps];
  int64_t start;   // where this tile's list begins
  uint32_t count;  // how long it is: in shared memory it takes no register
  PayloadTile tiles[kHeldRanks<Format>];
};

template <class Format>
__device__ __forceinline__ uint32_t position_of(const MergeShared<Format>& shared, uint32_t index) {
  const uint32_t word = index / 32;
  return shared.before[word] + __popc(shared.present[word] & ((1u << index % 32) - 1));
}

// Opens this tile in the payloads of kHeldRanks ranks and loads their entries: all loads are in
// flight before one is waited for. A rank beyond the last one has none. Returns whether this warp's
// payload is sound. The block has passed a barrier since it read `tiles`.
template <class Format>
__device__ __forceinline__ bool open_tiles(const MergeArgs& args, uint32_t first_rank,
                                           MergeShared<Format>* shared, HeldEntries<Format>& held) {
  bool sound = true;
  if (warp_id() < kHeldRanks<Format>) {
    PayloadTile* const tile = &shared->tiles[warp_id()];
    const uint32_t rank = min(first_rank + warp_id(), args.ranks - 1);
    sound = open_tile(args.source, rank, blockIdx.x, blockIdx.x == 0, tile);
    if (rank < first_rank + warp_id()) tile->clear();
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kHeldRanks<Format>; ++r) {
    shared->tiles[r].template hold<kMergeThreads>(
        static_cast<uint32_t>(args.source.payload.shape.k), held[r]);
  }
  return sound;
}

// The entries in registers leave room for two blocks on a multiprocessor.
template <class Format>
__global__ void __launch_bounds__(kMergeThreads, 2)
    merge_kernel(const __grid_constant__ MergeArgs args) {
  static __shared__ MergeShared<Format> shared;
  const int64_t tile = blockIdx.x;
  const int64_t numel = args.source.payload.shape.numel;
  const auto size = static_cast<uint32_t>(tile_size(numel, tile));
  const AggregateView<uint8_t>& out = args.out;
  AggregateHeader* const header = out.header;  // zero so far
  const bool skipped = args.skip && *args.skip != 0;
  if (tile == 0 && threadIdx.x == 0) {
    header->tag = kAggregateMagic;
    header->capacity = static_cast<uint32_t>(args.capacity);
    header->numel = static_cast<uint32_t>(numel);
    if (skipped) atomicOr(&header->flags, kNonfinite);
  }
  if (skipped) {
    if (threadIdx.x == 0) out.starts[tile] = out.counts[tile] = 0;
    return;
  }

  // Marks which elements are present. An entry that is out of order or range is found here, before
  // it is used for anything.
  for (int word = threadIdx.x; word < kWords; word += kMergeThreads) shared.present[word] = 0;
  HeldEntries<Format> held;
  bool sound = true;
  if (threadIdx.x == 0) shared.start = 0;
  const auto mark = [&](uint32_t index) {
    atomicOr(&shared.present[index / 32], 1u << index % 32);
  };
  for (uint32_t first = 0; first < args.ranks; first += kHeldRanks<Format>) {
    sound &= open_tiles(args, first, &shared, held);
#pragma unroll
    for (int r = 0; r < kHeldRanks<Format>; ++r) {
      const PayloadTile& payload = shared.tiles[r];
      if (threadIdx.x == 0) shared.start += payload.start;
      sound &= PayloadTile::sound<kMergeThreads>(held[r], size);
#pragma unroll
      for (int j = 0; j < kHeld; ++j)
        if (held[r][j].present()) mark(held[r][j].index());
    }
#pragma unroll 1
    for (int r = 0; r < kHeldRanks<Format>; ++r) {
      const PayloadTile& payload = shared.tiles[r];
      payload.for_each<kMergeThreads, kHeld>([&](uint32_t entry, uint32_t index, bool follows) {
        sound &= payload.sound<Format>(entry, index, follows, size);
        mark(index);
      });
    }
    if (__syncthreads_or(!sound)) {
      sound = false;
      break;
    }
  }
  if (!sound) {
    if (threadIdx.x == 0) {
      atomicOr(&header->flags, kDamaged);
      out.starts[tile] = out.counts[tile] = 0;
    }
    return;
  }
  if (threadIdx.x == 0 && shared.start > tile * kTile) shared.start = tile * kTile;

  const int first_word = threadIdx.x * kWordsEach;
  uint32_t own = 0, count;
  for (int i = 0; i < kWordsEach; ++i) own += __popc(shared.present[first_word + i]);
  uint32_t before = block_exclusive_sum<kMergeThreads>(own, &count, shared.warp_sums);
  for (int i = 0; i < kWordsEach; ++i) {
    shared.before[first_word + i] = static_cast<uint16_t>(before);
    if ((first_word + i) % kRunWords == 0)
      out.runs[tile * kTileRuns + (first_word + i) / kRunWords] = static_cast<uint16_t>(before);
    before += __popc(shared.present[first_word + i]);
  }
  if (threadIdx.x == 0) {
    out.starts[tile] = static_cast<uint32_t>(shared.start);
    out.counts[tile] = shared.count = count;
  }
  __syncthreads();

  for (uint32_t window = 0; window < shared.count; window += kMergeWindow) {
    for (int i = threadIdx.x; i < kMergeWindow; i += kMergeThreads) shared.sum[i] = 0.0f;
    const auto add_at = [&](uint32_t index, float value) {
      const uint32_t place = position_of(shared, index) - window;
      if (place < kMergeWindow) shared.sum[place] = add(shared.sum[place], value);
    };
    for (uint32_t first = 0; first < args.ranks; first += kHeldRanks<Format>) {
      if (args.ranks > kHeldRanks<Format>) {
        open_tiles(args, first, &shared, held);
      } else {
        __syncthreads();
      }
#pragma unroll
      for (int r = 0; r < kHeldRanks<Format>; ++r) {
        if (first + r >= args.ranks) break;
        const PayloadTile& payload = shared.tiles[r];
#pragma unroll
        for (int j = 0; j < kHeld; ++j)
          if (held[r][j].present())
            add_at(held[r][j].index(), Format::decode(held[r][j].code(), payload.scale));
        payload.for_each<kMergeThreads, kHeld>([&](uint32_t entry, uint32_t index, bool) {
          add_at(index, payload.value<Format>(entry));
        });
        __syncthreads();  // the next rank's entries may meet the same sums
      }
    }
    uint16_t* const indices = out.indices + shared.start;
    float* const values = out.values + shared.start;
    for (int word = threadIdx.x; word < kWords; word += kMergeThreads) {
      uint32_t position = shared.before[word];
      for (uint32_t left = shared.present[word]; left; left &= left - 1, ++position) {
        const uint32_t place = position - window;
        if (place >= kMergeWindow) continue;
        indices[position] = static_cast<uint16_t>(word * 32 + __ffs(left) - 1);
        values[position] = multiply(shared.sum[place], args.factor);
      }
    }
    __syncthreads();
  }
}

}  // namespace

void run(const MergeCall& call, const Stream& stream) {
  // Blocks that find damage set a flag in the header, whichever of them runs first.
  check(cudaMemsetAsync(call.aggregate, 0, sizeof(AggregateHeader), stream.stream));
  const PayloadShape& shape = call.payloads.shape;
  const int64_t numel = shape.numel;
  const int64_t capacity = aggregate_capacity(numel, shape.k, call.ranks);
  const AggregateView out(call.aggregate, AggregateLayout(numel, capacity));
  const MergeArgs args{PayloadSource(call.payloads),
                       static_cast<uint32_t>(call.ranks),
                       call.skip.verdict,
                       out,
                       capacity,
                       mean_factor(call.ranks)};
  with_wire_type(shape.wire, [&](auto format) {
    launch(merge_kernel<decltype(format)>, tile_count(numel), kMergeThreads, stream, args);
  });
}

}  // namespace gmc::cuda
