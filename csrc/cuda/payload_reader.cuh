// Reads a payload that came over a wire. Nothing in it is believed before it was checked.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

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

// An entry as a thread keeps it in a register: its index in the tile, and its code above that.
template <class Format>
struct PackedEntry {
  using Word = std::conditional_t<(Format::kBits > 16), uint64_t, uint32_t>;
  static constexpr int kShift = Format::kBits > 16 ? 32 : 16;
  static constexpr Word kNone = ~Word{0};

  Word word;

  // No sound code makes the word that stands for no entry. An unsound code that would make it
  // becomes another unsound one.
  static __device__ Word pack(uint32_t index, uint32_t code) {
    Word word = index | static_cast<Word>(code) << kShift;
    // Without this the compiler would keep index and code in two registers.
    if constexpr (sizeof(Word) == 4) asm("" : "+r"(word));
    return Format::kBits < 16 || word < kNone ? word : kNone - 1;
  }
  __device__ bool present() const { return word != kNone; }
  __device__ uint32_t index() const { return static_cast<uint32_t>(word) & 0xffffu; }
  __device__ uint32_t code() const { return static_cast<uint32_t>(word >> kShift); }
};

// How many threads of a CUDA block share a block of 256 elements.
template <int kOfBlock>
constexpr uint32_t kSharers = kOfBlock > kTileBlocks ? kOfBlock / kTileBlocks : 1;

// A payload's entries that belong to one wire tile, in shared memory.
struct PayloadTile {
  const uint8_t* low;    // of the whole payload: entry i of the tile has number start + i
  const uint8_t* codes;  // of the whole payload, as low
  uint32_t start, blocks;
  int32_t scale;
  // How many of the tile's entries lie in the blocks before, modulo 2**16; one more than there are
  // blocks.
  uint16_t begins[kTileBlocks + 1];

  // How many entries a block has; none for the block after the last.
  __device__ uint32_t length(uint32_t block) const {
    return static_cast<uint16_t>(begins[block + 1] - begins[block]);
  }
  __device__ uint32_t low_byte(uint32_t entry) const { return low[start + entry]; }
  template <class Format>
  __device__ uint32_t code(uint32_t entry) const {
    return load_code<Format>(codes, start + entry);
  }
  template <class Format>
  __device__ float value(uint32_t entry) const {
    return Format::decode(code<Format>(entry), scale);
  }

  // Calls function(entry, index, whether an entry of the same block lies before) for each of this
  // thread's entries, except the first kHeld of its first block. Few threads have more than one or
  // two of them at usual densities.
  template <int kOfBlock, int kHeld = 0, class Function>
  __device__ __forceinline__ void for_each(const Function& function) const {
    constexpr auto kBlockSize = static_cast<uint32_t>(kBlock);
    constexpr uint32_t kSharing = kSharers<kOfBlock>;
    for (uint32_t i = threadIdx.x; i < blocks * kSharing; i += kOfBlock) {
      const uint32_t block = i / kSharing, begin = begins[block], end = begin + length(block);
      uint32_t entry = begin + i % kSharing;
      if (i == threadIdx.x) entry += kHeld * kSharing;
#pragma unroll 1  // there are few: copies of this would cost registers for nothing
      for (; entry < end; entry += kSharing)
        function(entry, block * kBlockSize + low_byte(entry), entry > begin);
    }
  }

  // Loads the entries that for_each leaves out. The loads do not depend on whether there are as
  // many, so that no branch lies between them and all are in flight at once. numbers: how many
  // entries the whole payload has.
  template <int kOfBlock, class Format, int kHeld>
  __device__ __forceinline__ void hold(uint32_t numbers, PackedEntry<Format> (&held)[kHeld]) const {
    constexpr uint32_t kSharing = kSharers<kOfBlock>;
    const uint32_t block = min(threadIdx.x / kSharing, blocks);
    const uint32_t first = start + begins[block], count = length(block);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const uint32_t place = threadIdx.x % kSharing + j * kSharing;
      const uint32_t number = min(first + place, numbers - 1);
      const auto word = PackedEntry<Format>::pack(
          block * static_cast<uint32_t>(kBlock) + low[number], load_code<Format>(codes, number));
      held[j].word = place < count ? word : PackedEntry<Format>::kNone;
    }
  }

  // True if the held indices ascend, lie inside the tile, and have sound codes. The two threads of
  // a block are neighbours in a warp, and all lanes of the warp call this.
  template <int kOfBlock, class Format, int kHeld>
  static __device__ __forceinline__ bool sound(const PackedEntry<Format> (&held)[kHeld],
                                               uint32_t size) {
    constexpr uint32_t kSharing = kSharers<kOfBlock>;
    static_assert(kSharing <= 2, "a thread has one neighbour");
    const bool second = kSharing == 2 && threadIdx.x % 2 != 0;
    bool sound = true;
    uint32_t before = 0;  // index of the entry before, where there is one
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const uint32_t index = held[j].index();
      const uint32_t other = kSharing == 2 ? __shfl_xor_sync(kAllLanes, index, 1) : index;
      const bool follows = second || j > 0;
      const bool ordered = !follows || (second ? other : before) < index;
      sound &= !held[j].present() || (ordered && index < size && Format::sound(held[j].code()));
      before = other;
    }
    return sound;
  }

  // Makes this a tile without entries; low and codes stay. A whole warp calls it.
  __device__ void clear() {
    __syncwarp();
    if (lane_id() == 0) start = blocks = begins[0] = begins[1] = 0;
  }

  // True if an entry of for_each lies after its predecessor and inside the tile, and has a sound
  // code.
  template <class Format>
  __device__ bool sound(uint32_t entry, uint32_t index, bool follows, uint32_t size) const {
    return (!follows || low_byte(entry - 1) < low_byte(entry)) && index < size &&
           Format::sound(code<Format>(entry));
  }
};

// A warp writes where each block's entries begin. Every lane gets false unless the tile's bits end
// as many blocks as it has, the last one with the last bit. A block may still claim more entries
// than it has elements, which cannot all be in order.
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
#pragma unroll 1  // one or two
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
  if (lane_id() == 0) {
    begins[0] = 0;
    begins[blocks] = begins[min(blocks + 1, uint32_t{kTileBlocks})] = static_cast<uint16_t>(count);
  }
  __syncwarp();
  // The last block alone could hold 2**16 entries, which would read as none.
  sound &= count - begins[blocks - 1] <= static_cast<uint32_t>(kBlock);
  return __all_sync(kAllLanes, sound && ended == blocks);
}

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

// A warp opens a tile of one rank's payload; other warps may read it after the next barrier. With
// `whole` it also checks what lies between the sections. Every lane gets false, and the tile is
// empty, when header, offsets or bitmap contradict this bucket.
static __device__ __noinline__ bool open_tile(const PayloadSource& source, int64_t rank,
                                              int64_t tile, bool whole, PayloadTile* out) {
  const PayloadShape& shape = source.payload.shape;
  const PayloadLayout& layout = source.layout;
  const uint8_t* const bytes = source.payload.data + rank * layout.nbytes;
  const PayloadView view(bytes, layout);
  const TileRange range = tile_range(view.starts, shape, tile);
  bool sound = header_fault(*view.header, shape) == HeaderFault::kNone && range.count >= 0 &&
               range.count <= tile_size(shape.numel, tile);
  if (lane_id() == 0) {
    out->low = view.low;
    out->codes = view.values;
    out->scale = view.header->scale;
    out->start = static_cast<uint32_t>(range.start);
    out->blocks = static_cast<uint32_t>(range.zeros);
  }
  sound = sound && read_blocks(view.bitmap, range, out->begins);
  if (whole) sound = __all_sync(kAllLanes, sound && clear_between(bytes, layout, shape));
  if (!sound) out->clear();
  return sound;
}

// A block reads the wire tile that it owns of one rank's payload: calls function(place in the
// payload, index in its elements, value) for all entries, or for none if any of them is damaged.
template <class Format, class Function>
__device__ __forceinline__ void for_each_entry(const PayloadSource& source, int64_t rank,
                                               PayloadTile* shared, const Function& function) {
  const int64_t tile = blockIdx.x;
  const auto size = static_cast<uint32_t>(tile_size(source.payload.shape.numel, tile));
  bool sound = warp_id() != 0 || open_tile(source, rank, tile, true, shared);
  __syncthreads();
  shared->for_each<kThreads>([&](uint32_t entry, uint32_t index, bool follows) {
    sound &= shared->sound<Format>(entry, index, follows, size);
  });
  if (__syncthreads_or(!sound)) return;
  shared->for_each<kThreads>([&](uint32_t entry, uint32_t index, bool) {
    function(shared->start + entry, tile * kTile + index, shared->value<Format>(entry));
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
