// merge: the payloads of all ranks to one aggregate, summed in rank order, without float atomics.
//
// A block owns one wire tile. Its warps open the pieces of the ranks' payloads, and write the block
// of each entry into shared memory. From then on entry i belongs to thread i modulo the number of
// threads. All are checked, and mark in a bitmap which elements any rank sent. A prefix over the
// bitmap's words gives each of them its place in the merged list. One window of that list at a time
// is then summed in shared memory, rank after rank, beside the index of each sum, and copied. The
// list is far shorter than the tile, so that one window usually holds all of it.
#include <algorithm>

#include "block.cuh"
#include "launch.h"
#include "payload_reader.cuh"
#include "shared/calls.h"

extern __shared__ uint4 dynamic_shared[];  // a MergeShared: more than may be static

namespace gmc::cuda {
namespace {

constexpr int kWords = kTile / 32;
constexpr int kRunWords = static_cast<int>(kAggregateRun) / 32;
constexpr int kWordsEach = kWords / kMergeThreads;
static_assert(kWords % kMergeThreads == 0 && kRunWords % kWordsEach == 0,
              "each thread has as many words of the bitmap, all of one run");

constexpr int kOpen = std::min(8, kMergeWarps);  // how many pieces are open at once
constexpr int kEach = static_cast<int>(kPieceBits) / kMergeThreads;  // entries of one in a thread
constexpr int kLoaded = std::min(4, kOpen);  // pieces whose entries are loaded at once

struct MergeArgs {
  PayloadSource source;
  uint32_t ranks;
  const int32_t* skip;
  AggregateView<uint8_t> out;
  int64_t capacity;
  float factor;  // 1 / ranks
};

struct MergeShared {
  uint32_t present[kWords];
  uint16_t before[kWords];  // entries in the words before
  float sum[kMergeWindow];
  uint16_t index[kMergeWindow];
  uint32_t warp_sums[kMergeWarps];
  uint32_t start_high, start_low;  // sums over the ranks' starts: of 16 bits each
  uint32_t rounds;                 // how many pieces the tile has in a payload, at most
  PayloadPiece pieces[kOpen];
};

// The pieces of all payloads, those of the first rank first, so that sums are made in rank order.
// Opens those from `first` on. Returns whether this warp's is sound.
__device__ __forceinline__ bool open_pieces(const MergeArgs& args, uint32_t first,
                                            MergeShared* shared) {
  bool sound = true;
  if (warp_id() < kOpen) {
    const uint32_t piece = first + warp_id(), rank = piece / shared->rounds;
    PayloadPiece* const out = &shared->pieces[warp_id()];
    if (rank < args.ranks) {
      sound =
          open_piece(args.source, rank, blockIdx.x, piece % shared->rounds, blockIdx.x == 0, out);
    } else if (lane_id() == 0) {
      out->count = 0;
    }
  }
  __syncthreads();
  return sound;
}

template <class Format>
__global__ void __launch_bounds__(kMergeThreads, 2)
    merge_kernel(const __grid_constant__ MergeArgs args) {
  MergeShared& shared = *reinterpret_cast<MergeShared*>(dynamic_shared);
  const int64_t tile = blockIdx.x;
  const PayloadShape& shape = args.source.payload.shape;
  const auto size = static_cast<uint32_t>(tile_size(shape.numel, tile));
  const AggregateView<uint8_t>& out = args.out;
  AggregateHeader* const header = out.header;          // zero so far
  const int32_t verdict = args.skip ? *args.skip : 0;  // on its way with the starts
  for (int word = threadIdx.x; word < kWords; word += kMergeThreads) shared.present[word] = 0;
  if (threadIdx.x == 0) {
    shared.start_high = shared.start_low = 0;
    shared.rounds = 1;
  }
  __syncthreads();
  for (uint32_t rank = threadIdx.x; rank < args.ranks; rank += kMergeThreads) {
    const uint8_t* const payload = args.source.payload.data + rank * args.source.layout.nbytes;
    const auto* const starts = at<uint32_t>(payload, args.source.layout.starts);
    const TileRange range = tile_range(starts, shape, tile);
    atomicAdd(&shared.start_high, static_cast<uint32_t>(range.start) >> 16);
    atomicAdd(&shared.start_low, static_cast<uint32_t>(range.start) & 0xffffu);
    atomicMax(&shared.rounds, piece_count(range));
  }
  const bool skipped = verdict != 0;
  if (tile == 0 && threadIdx.x == 0) {
    header->tag = kAggregateMagic;
    header->capacity = static_cast<uint32_t>(args.capacity);
    header->numel = static_cast<uint32_t>(shape.numel);
    if (skipped) atomicOr(&header->flags, kNonfinite);
  }
  __syncthreads();
  // A skipped step has no pieces.
  const uint32_t pieces = skipped ? 0 : args.ranks * shared.rounds;

  // Marks which elements are present. What is damaged is found here, before it is used.
  bool sound = !skipped;
  for (uint32_t first = 0; first < pieces; first += kOpen) {
    if (first != 0) __syncthreads();  // the pieces before were read
    sound &= open_pieces(args, first, &shared);
#pragma unroll
    for (int group = 0; group < kOpen; group += kLoaded) {
      LoadedEntry<Format> entries[kLoaded][kEach];
#pragma unroll
      for (int n = 0; n < kLoaded * kEach; ++n) {
        const PayloadPiece& piece = shared.pieces[group + n / kEach];
        const uint32_t i = threadIdx.x + n % kEach * kMergeThreads;
        if (i < piece.count) entries[n / kEach][n % kEach] = LoadedEntry<Format>(piece, i);
      }
#pragma unroll
      for (int n = 0; n < kLoaded * kEach; ++n) {
        const PayloadPiece& piece = shared.pieces[group + n / kEach];
        const uint32_t i = threadIdx.x + n % kEach * kMergeThreads;
        if (i >= piece.count) continue;
        const uint32_t index = entries[n / kEach][n % kEach].check(piece, i, size, &sound);
        atomicOr(&shared.present[index / 32], 1u << index % 32);
      }
    }
  }
  if (__syncthreads_or(!sound)) {
    if (threadIdx.x == 0) {
      if (!skipped) atomicOr(&header->flags, kDamaged);
      out.starts[tile] = out.counts[tile] = 0;
    }
    return;
  }

  const int first_word = threadIdx.x * kWordsEach;
  uint32_t own = 0, count;
  for (int i = 0; i < kWordsEach; ++i) own += __popc(shared.present[first_word + i]);
  uint32_t before = block_exclusive_sum<kMergeThreads>(own, &count, shared.warp_sums);
  if (first_word % kRunWords == 0)
    out.runs[tile * kTileRuns + first_word / kRunWords] = static_cast<uint16_t>(before);
  for (int i = 0; i < kWordsEach; ++i) {
    shared.before[first_word + i] = static_cast<uint16_t>(before);
    before += __popc(shared.present[first_word + i]);
  }
  const int64_t start =
      min((static_cast<int64_t>(shared.start_high) << 16) + shared.start_low, tile * kTile);
  if (threadIdx.x == 0) {
    out.starts[tile] = static_cast<uint32_t>(start);
    out.counts[tile] = count;
  }

  for (uint32_t window = 0; window < count; window += kMergeWindow) {
    for (int i = threadIdx.x; i < kMergeWindow; i += kMergeThreads) shared.sum[i] = 0.0f;
    for (uint32_t first = 0; first < pieces; first += kOpen) {
      __syncthreads();
      if (pieces > kOpen) open_pieces(args, first, &shared);
      for (uint32_t p = 0; p < kOpen && first + p < pieces; ++p) {
        const PayloadPiece& piece = shared.pieces[p];
        for (uint32_t i = threadIdx.x; i < piece.count; i += kMergeThreads) {
          const uint32_t index = piece.index(i), word = index / 32;
          const uint32_t below = shared.present[word] & ((1u << index % 32) - 1);
          const uint32_t place = shared.before[word] + __popc(below) - window;
          if (place >= kMergeWindow) continue;
          shared.sum[place] = add(shared.sum[place], piece.value<Format>(i));
          shared.index[place] = static_cast<uint16_t>(index);
        }
        __syncthreads();  // the next rank's entries may meet the same sums
      }
    }
    const uint32_t length = min(count - window, uint32_t{kMergeWindow});
    for (uint32_t i = threadIdx.x; i < length; i += kMergeThreads) {
      out.indices[start + window + i] = shared.index[i];
      out.values[start + window + i] = multiply(shared.sum[i], args.factor);
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
    launch_dynamic(merge_kernel<decltype(format)>, tile_count(numel), kMergeThreads,
                   sizeof(MergeShared), stream, args);
  });
}

}  // namespace gmc::cuda
