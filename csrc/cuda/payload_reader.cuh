// Reads a payload that came over a wire. Nothing in it is believed before it was checked.
#pragma once

#include <cuda_runtime.h>

#include "block.cuh"
#include "shared/bucket.h"
#include "shared/rule.h"
#include "sizes.h"

namespace gmc::cuda {

// One rank's payload, or those of several. The layout is computed on the host: as part of a
// kernel's parameters it takes no registers.
struct PayloadSource {
  Payload payload;
  PayloadLayout layout;

  GMC_HD explicit PayloadSource(const Payload& payload) : payload(payload), layout(payload.shape) {}
};

// The bitmap of a wire tile is read in pieces, a word for each lane of a warp. At 1 % and below a
// tile is one piece.
constexpr uint32_t kPieceBits = 32 * 32;

// How many pieces a tile has; at least one.
__device__ __forceinline__ uint32_t piece_count(const TileRange& range) {
  if (range.count < 0 || range.count > kTile) return 1;  // damaged
  return static_cast<uint32_t>((range.bit % 32 + range.bits + kPieceBits - 1) / kPieceBits);
}

// The entries of one piece, in shared memory. Entry i is the payload's entry first + i.
struct PayloadPiece {
  const uint8_t* low;    // of the whole payload
  const uint8_t* codes;  // of the whole payload
  uint32_t first, count;
  uint32_t pieces;  // of the tile
  int32_t scale;
  // The block of each entry. Place 0 stands for the entry before the first: it is the block of that
  // entry if this is the first one's too, and any other block if not.
  uint8_t block[1 + kPieceBits];

  __device__ uint32_t index(uint32_t i) const {
    return block[1 + i] * static_cast<uint32_t>(kBlock) + low[first + i];
  }
  template <class Format>
  __device__ float value(uint32_t i) const {
    return Format::decode(load_code<Format>(codes, first + i), scale);
  }
};

// What a thread loads of an entry to check it.
template <class Format>
struct LoadedEntry {
  uint32_t low, low_before, code;

  LoadedEntry() = default;
  __device__ LoadedEntry(const PayloadPiece& piece, uint32_t i)
      : low(piece.low[piece.first + i]),
        low_before((piece.low - 1)[piece.first + i]),
        code(load_code<Format>(piece.codes, piece.first + i)) {}

  // Its index in the tile. *sound becomes false unless it lies after its predecessor and inside the
  // tile, and has a sound code.
  __device__ uint32_t check(const PayloadPiece& piece, uint32_t i, uint32_t size,
                            bool* sound) const {
    const uint32_t block = piece.block[1 + i], index = block * static_cast<uint32_t>(kBlock) + low;
    *sound &= (block != piece.block[i] || low_before < low) && index < size && Format::sound(code);
    return index;
  }
};

// A warp looks for bits that belong to no section. Each lane gets its own answer: false if it found
// any.
__device__ __forceinline__ bool clear_between(const uint8_t* payload, const PayloadLayout& layout,
                                              const PayloadShape& shape) {
  bool clear = layout.clear_after_bits(payload, shape);
  layout.for_each_gap([&](int64_t begin, int64_t end) {  // shorter than a warp
    if (begin + lane_id() < end) clear &= payload[begin + lane_id()] == 0;
  });
  return clear;
}

// A warp opens piece `number` of a tile of one rank's payload; other warps may read it after the
// next barrier. With `whole` it also checks what lies between the sections. Every lane gets false,
// and the piece is empty, when header, offsets or bitmap contradict this bucket. Whether a tile's
// bits end as many blocks as it has, the last one with the last bit, is known at its last piece.
__device__ __forceinline__ bool open_piece(const PayloadSource& source, int64_t rank, int64_t tile,
                                           uint32_t number, bool whole, PayloadPiece* out) {
  const PayloadShape& shape = source.payload.shape;
  const PayloadLayout& layout = source.layout;
  const uint8_t* const bytes = source.payload.data + rank * layout.nbytes;
  const PayloadView view(bytes, layout);
  const TileRange range = tile_range(view.starts, shape, tile);
  const uint32_t pieces = piece_count(range);
  bool sound = header_fault(*view.header, shape) == HeaderFault::kNone && range.count >= 0 &&
               range.count <= tile_size(shape.numel, tile);
  const uint32_t* const words = at<uint32_t>(view.bitmap, 0) + range.bit / 32;
  const auto skipped = static_cast<uint32_t>(range.bit % 32);  // bits of the tile before
  const uint32_t end = sound ? skipped + static_cast<uint32_t>(range.bits) : 0;
  // Those of a word's bits that are the tile's: its entries, then the ends of its blocks.
  const auto ones_and_zeros = [&](uint32_t bit) {
    if (bit >= end) return make_uint2(0, 0);
    const uint32_t word = words[bit / 32];
    uint32_t own = bit < skipped ? ~0u << skipped : ~0u;
    if (end - bit < 32) own &= (1u << (end - bit)) - 1;
    return make_uint2(word & own, ~word & own);
  };

  const uint32_t begin = number * kPieceBits, bit = begin + 32 * lane_id();
  uint32_t ended = 0;  // blocks that end in the pieces before
#pragma unroll 1       // few tiles have more than one piece
  for (uint32_t before = 32 * lane_id(); before < begin; before += kPieceBits)
    ended += __popc(ones_and_zeros(before).y);
  ended = __reduce_add_sync(kAllLanes, ended);
  const uint2 word = ones_and_zeros(bit);
  const auto zeros = static_cast<uint32_t>(__popc(word.y));
  const uint32_t inclusive = ended + warp_inclusive_sum(zeros);
  const auto ones = static_cast<uint32_t>(__popc(word.x));
  const uint32_t entries = warp_inclusive_sum(ones);
  // Bit i of the word is entry i - (zeros before it in the word) of the lane's.
  uint8_t* place = out->block + 1 + (entries - ones);
  uint32_t block = inclusive - zeros;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    if (word.x >> i & 1) *place++ = static_cast<uint8_t>(block);
    block += word.y >> i & 1;
  }
  const uint32_t total = __shfl_sync(kAllLanes, inclusive, 31);
  const uint32_t count = __shfl_sync(kAllLanes, entries, 31);
  const uint32_t before = begin == 0 ? 0 : begin - skipped - ended;
  if (begin < end) {  // other payloads may have more pieces of this tile
    sound &= before + count <= range.count;
    const uint32_t last = words[(end - 1) / 32] >> (end - 1) % 32;
    if (number + 1 == pieces) sound &= total == range.zeros && (last & 1) == 0;
  }
  if (whole) sound &= clear_between(bytes, layout, shape);
  sound = __all_sync(kAllLanes, sound);
  __syncwarp();
  if (lane_id() == 0) {
    const bool follows = begin != 0 && begin < end && words[begin / 32 - 1] >> 31 != 0;
    out->low = view.low;
    out->codes = view.values;
    out->first = static_cast<uint32_t>(range.start) + before;
    out->count = sound ? count : 0;
    out->pieces = pieces;
    out->scale = view.header->scale;
    out->block[0] = static_cast<uint8_t>(follows ? ended : out->block[1] + 1);
  }
  return sound;
}

// A block reads a wire tile of one payload, piece after piece in *piece: calls meet(is it the
// first) after a piece has been opened, then function(i) for each entry i of each piece, or for
// none and returns false if any of the tile is damaged, or what lies between the sections with
// `whole`.
template <class Format, class Meet, class Function>
__device__ __forceinline__ bool read_tile(const PayloadSource& source, int64_t rank, int64_t tile,
                                          bool whole, PayloadPiece* piece, const Meet& meet,
                                          const Function& function) {
  const auto size = static_cast<uint32_t>(tile_size(source.payload.shape.numel, tile));
  bool sound = true;
  uint32_t number = 0;
  for (bool checked = false;;) {
    if (!checked || piece->pieces > 1) {
      __syncthreads();  // the piece before was read
      if (warp_id() == 0) sound &= open_piece(source, rank, tile, number, whole, piece);
      __syncthreads();
    }
    if (!checked) meet(number == 0);
    for (uint32_t i = threadIdx.x; i < piece->count; i += kThreads) {
      if (checked) {
        function(i);
      } else {
        LoadedEntry<Format>(*piece, i).check(*piece, i, size, &sound);
      }
    }
    if (++number < piece->pieces) continue;
    if (checked) return true;
    if (__syncthreads_or(!sound)) return false;
    checked = true;
    number = 0;
  }
}

// A block reads the wire tile that it owns of one rank's payload: calls function(place in the
// payload, index in its elements, value) for all entries, or for none if any of them is damaged.
template <class Format, class Function>
__device__ __forceinline__ void for_each_entry(const PayloadSource& source, int64_t rank,
                                               PayloadPiece* piece, const Function& function) {
  const int64_t tile = blockIdx.x;
  read_tile<Format>(
      source, rank, tile, true, piece, [](bool) {},
      [&](uint32_t i) {
        function(piece->first + i, tile * kTile + piece->index(i),
                 piece->template value<Format>(i));
      });
}

// Adds each sent value back to memory.
struct GiveBack {
  float* memory;
  __device__ void operator()(uint32_t, int64_t index, float value) const {
    memory[index] = add(memory[index], value);
  }
};

}  // namespace gmc::cuda
