#include "payload_reader.h"

#include <algorithm>
#include <cstring>

namespace gmc::cpu {
namespace {

// The bits from `bit` on, at least 57 of them. Behind every bitmap lies a section of values, so
// that a word may be read at its end.
uint64_t bits_from(const uint8_t* bitmap, int64_t bit) {
  uint64_t word;
  std::memcpy(&word, bitmap + bit / 8, sizeof word);
  return word >> (bit % 8);
}

// Writes the block of each of a tile's entries. False unless its bits hold as many ones as entries
// and as many zeros as blocks, a zero last.
bool read_blocks(const uint8_t* bitmap, const TileRange& range, uint8_t* block) {
  int64_t bit = range.bit, entry = 0;
  int64_t left = 0;  // bits of `window` that may be looked at
  uint64_t window = 0;
  for (int64_t b = 0; b < range.zeros; ++b) {
    const uint64_t here = b * 0x0101010101010101u;
    while (true) {
      if (left < 9) {
        window = bits_from(bitmap, bit);
        left = 57;
      }
      // Eight at a time: a block rarely has more entries.
      const int64_t ones = std::min<int64_t>(__builtin_ctzll(~window | 0x100), 8);
      std::memcpy(block + entry, &here, sizeof here);
      entry += ones;
      if (entry > range.count) return false;
      const bool ended = ones < 8 || (window >> 8 & 1) == 0;
      const int64_t used = ones + ended;
      window >>= used;
      bit += used;
      left -= used;
      if (ended) break;
    }
  }
  return entry == range.count;
}

// Puts the indices together. False unless they ascend and are below size.
bool join(const uint8_t* block, const uint8_t* low, int64_t count, int64_t size, uint16_t* index) {
  for (int64_t i = 0; i < count; ++i) index[i] = static_cast<uint16_t>(block[i] << 8 | low[i]);
  bool ascending = true;
  for (int64_t i = 1; i < count; ++i) ascending &= index[i] > index[i - 1];
  return ascending && (count == 0 || index[count - 1] < size);
}

bool finite(WireType wire, const uint8_t* codes, int64_t start, int64_t count) {
  return with_wire_type(wire, [=](auto format) {
    bool sound = true;
    for (int64_t i = start; i < start + count; ++i)
      sound &= decltype(format)::sound(load_code<decltype(format)>(codes, i));
    return sound;
  });
}

bool all_zero(const uint8_t* begin, const uint8_t* end) {
  return std::all_of(begin, end, [](uint8_t byte) { return byte == 0; });
}

}  // namespace

PayloadReader::PayloadReader(const Payload& payloads, int64_t rank)
    : shape_(payloads.shape),
      rank_(rank),
      layout_(shape_),
      payload_(payloads.data + rank * layout_.nbytes),
      view_(payload_, layout_) {
  const PayloadHeader& header = *view_.header;
  switch (header_fault(header, shape_)) {
    case HeaderFault::kNone:
      break;
    case HeaderFault::kK:
      fail("it says k = " + std::to_string(header.k) + ", not " + std::to_string(shape_.k));
    case HeaderFault::kNumel:
      fail("it says numel = " + std::to_string(header.numel) + ", not " +
           std::to_string(shape_.numel));
    case HeaderFault::kScale:
      fail("it says scale = " + std::to_string(header.scale) + ", out of range");
    default:
      fail("its header has another format or wire dtype");
  }
  bool clear = layout_.clear_behind(payload_, shape_);
  layout_.for_each_gap([&](int64_t begin, int64_t end) {
    clear &= all_zero(payload_ + begin, payload_ + end);
  });
  if (!clear) fail("there are bits behind the end of a section");
}

PayloadEntries PayloadReader::tile(int64_t tile, TileIndices* indices) const {
  const TileRange range = tile_range(view_.starts, shape_, tile);
  if (range.count < 0)
    fail("the start offsets of tile " + std::to_string(tile) + " are out of order");
  uint8_t* const block = indices->block.data();
  uint16_t* const index = indices->index.data();
  if (range.count > kTile || !read_blocks(view_.bitmap, range, block) ||
      !join(block, view_.low + range.start, range.count, tile_size(shape_.numel, tile), index) ||
      !finite(shape_.wire, view_.values, range.start, range.count))
    fail("tile " + std::to_string(tile) + " holds indices or values out of range");
  return {index, view_.values, range.start, range.count, view_.header->scale};
}

void PayloadReader::fail(const std::string& what) const {
  throw DamagedPayload("payload of rank " + std::to_string(rank_) + " is damaged: " + what);
}

}  // namespace gmc::cpu
