// Reading a payload that came over a wire: nothing in it is believed before it was checked.
#pragma once

#include <cuda_runtime.h>

#include "block.cuh"
#include "bucket.h"

namespace gmc::cuda {

// One rank's payload, or those of several. The layout is worked out on the host: as part of a
// kernel's parameters it takes no registers.
struct PayloadSource {
  Payload payload;
  PayloadLayout layout;

  explicit PayloadSource(const Payload& payload) : payload(payload), layout(payload.shape) {}
};

// A payload's entries that belong to one wire tile, in shared memory.
template <class Format>
struct PayloadTile {
  const uint8_t* low;    // of the tile's first entry
  const uint8_t* codes;  // of the whole payload: entry i of the tile has code start + i
  uint32_t start, count, blocks;
  int32_t scale;
  uint16_t begins[kTileBlocks];  // how many of the tile's entries lie in the blocks before

  __device__ uint32_t code(uint32_t entry) const {
    return load_code<Format>(codes, static_cast<int64_t>(start) + entry);
  }
  __device__ float value(uint32_t entry) const { return Format::decode(code(entry), scale); }

  // Calls function(entry, index, whether an entry of the same block lies before) for each of this
  // thread's entries. Few threads have more than one or two of them at usual densities.
  template <int kOfBlock, class Function>
  __device__ __forceinline__ void for_each(const Function& function) const {
    constexpr auto kBlockSize = static_cast<uint32_t>(kBlock);
    constexpr uint32_t kSharing = kOfBlock > kTileBlocks ? kOfBlock / kTileBlocks : 1;
    for (uint32_t i = threadIdx.x; i < blocks * kSharing; i += kOfBlock) {
      const uint32_t block = i / kSharing, begin = begins[block];
      const uint32_t end = block + 1 < blocks ? begins[block + 1] : count;
      for (uint32_t entry = begin + i % kSharing; entry < end; entry += kSharing)
        function(entry, block * kBlockSize + low[entry], entry > begin);
    }
  }

  // Whether an entry of `for_each` lies behind its predecessor and within the tile, and has a code.
  __device__ bool sound(uint32_t entry, uint32_t index, bool follows, uint32_t size) const {
    return (!follows || low[entry - 1] < low[entry]) && index < size && Format::sound(code(entry));
  }
};

// A warp writes where each block's entries begin. False, to every lane, unless the tile's bits end
// as many blocks as it has, the last one with the last bit.
__device__ __forceinline__ bool read_blocks(const uint8_t* bitmap, const TileRange& range,
                                            uint16_t* begins) {
  const uint32_t* const words = at<uint32_t>(bitmap, 0) + range.bit / 32;
  const auto skipped = static_cast<uint32_t>(range.bit % 32);  // bits of the tile before
  const uint32_t end = skipped + static_cast<uint32_t>(range.bits);
  const auto blocks = static_cast<uint32_t>(range.zeros);
  const auto count = static_cast<uint32_t>(range.count);
  bool sound = true;
  uint32_t ended = 0;
  for (uint32_t first = 0; first < end; first += 32 * 32) {
    const uint32_t bit = first + 32 * lane_id();  // where this lane's word begins
    uint32_t zeros = 0;
    if (bit < end) {
      zeros = ~words[bit / 32];
      if (bit < skipped) zeros &= ~0u << skipped;
      if (end - bit < 32) zeros &= (1u << (end - bit)) - 1;
    }
    const auto own = static_cast<uint32_t>(__popc(zeros));
    const uint32_t inclusive = warp_inclusive_sum(own);
    for (uint32_t block = ended + inclusive - own; zeros != 0; zeros &= zeros - 1, ++block) {
      const uint32_t entries = bit + __ffs(static_cast<int>(zeros)) - 1 - skipped - block;
      if (block + 1 < blocks) {
        sound &= entries <= (block + 1) * static_cast<uint32_t>(kBlock);
        begins[block + 1] = static_cast<uint16_t>(entries);
      } else {
        sound &= block + 1 == blocks && entries == count;
      }
    }
    ended += __shfl_sync(kAllLanes, inclusive, 31);
  }
  if (lane_id() == 0) begins[0] = 0;
  return __all_sync(kAllLanes, sound && ended == blocks);
}

// A warp looks for bits that belong to no section. Each lane gets an answer of its own.
__device__ __forceinline__ bool clear_between(const uint8_t* payload, const PayloadLayout& layout,
                                              const PayloadShape& shape) {
  bool clear = layout.clear_behind(payload, shape);
  layout.for_each_gap([&](int64_t begin, int64_t end) {  // shorter than a warp
    if (begin + lane_id() < end) clear &= payload[begin + lane_id()] == 0;
  });
  return clear;
}

// A warp opens a tile of one rank's payload; other warps may read it behind the next barrier. What
// lies between the sections is looked at where `whole` says so. False, to every lane, when header,
// offsets or bitmap contradict this bucket; the tile is then empty.
template <class Format>
__device__ __forceinline__ bool open_tile(const PayloadSource& source, int64_t rank, int64_t tile,
                                          bool whole, PayloadTile<Format>* out) {
  const PayloadShape& shape = source.payload.shape;
  const PayloadLayout& layout = source.layout;
  const uint8_t* const bytes = source.payload.data + rank * layout.nbytes;
  const PayloadView view(bytes, layout);
  const TileRange range = tile_range(view.starts, shape, tile);
  bool sound = header_fault(*view.header, shape) == HeaderFault::kNone && range.count >= 0 &&
               range.count <= tile_size(shape.numel, tile);
  if (lane_id() == 0) {
    out->low = view.low + range.start;
    out->codes = view.values;
    out->scale = view.header->scale;
    out->start = static_cast<uint32_t>(range.start);
    out->count = static_cast<uint32_t>(range.count);
    out->blocks = static_cast<uint32_t>(range.zeros);
  }
  sound = sound && read_blocks(view.bitmap, range, out->begins);
  if (whole) sound = __all_sync(kAllLanes, sound && clear_between(bytes, layout, shape));
  if (!sound && lane_id() == 0) out->start = out->count = out->blocks = 0;
  return sound;
}

}  // namespace gmc::cuda
