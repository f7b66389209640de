#include "payload_reader.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace gmc::cpu {
namespace {

// What a byte of a bitmap says.
struct BitmapByte {
  uint64_t zeros_before = 0;  // for each of its ones, in order, a byte: how many zeros lie before
  int64_t ones = 0;
};

constexpr std::array<BitmapByte, 256> make_bytes() {
  std::array<BitmapByte, 256> bytes{};
  for (unsigned value = 0; value < 256; ++value) {
    BitmapByte& byte = bytes[value];
    for (int bit = 0; bit < 8; ++bit)
      if (value >> bit & 1) {
        const uint64_t zeros = bit - byte.ones;
        byte.zeros_before |= zeros << (8 * byte.ones++);
      }
  }
  return bytes;
}
constexpr std::array<BitmapByte, 256> kBytes = make_bytes();

// Writes the block of each of a tile's entries, and up to 8 places more. Returns false unless the
// tile's bits hold as many ones as entries and end with a zero, and so hold as many zeros as
// blocks.
bool read_blocks(const uint8_t* bitmap, const TileRange& range, uint8_t* block) {
  constexpr int64_t kStep = 56;  // bits of an unaligned word that are there wherever it begins
  int64_t entry = 0, zeros = 0;
  for (int64_t done = 0; done < range.bits; done += kStep) {
    const int64_t bit = range.bit + done, left = std::min(range.bits - done, kStep);
    uint64_t word;  // may be read at the end: values come after the bitmap
    std::memcpy(&word, bitmap + bit / 8, sizeof word);
    word = word >> (bit % 8) & ((uint64_t{1} << left) - 1);
    for (int64_t at = 0; at < left; at += 8, word >>= 8) {
      const auto& [zeros_before, ones] = kBytes[word & 0xff];
      if (entry + ones > range.count) return false;
      const uint64_t blocks = zeros_before + zeros * 0x0101010101010101u;
      std::memcpy(block + entry, &blocks, sizeof blocks);
      entry += ones;
      zeros += 8 - ones;
    }
  }
  const int64_t last = range.bit + range.bits - 1;
  return entry == range.count && (bitmap[last / 8] >> (last % 8) & 1) == 0;
}

// Joins blocks and low bytes to indices. Returns false unless they ascend and are below size.
bool join(const uint8_t* block, const uint8_t* low, int64_t count, int64_t size, uint16_t* index) {
  for (int64_t i = 0; i < count; ++i) index[i] = static_cast<uint16_t>(block[i] << 8 | low[i]);
  uint16_t disordered = 0;  // in a type as wide as the indices, so that the loop is vectorised
  for (int64_t i = 1; i < count; ++i) disordered |= index[i] <= index[i - 1];
  return !disordered && (count == 0 || index[count - 1] < size);
}

bool finite(WireType wire, const uint8_t* codes, int64_t start, int64_t count) {
  return with_wire_type(wire, [=](auto format) {
    uint32_t unsound = 0;
    for (int64_t i = start; i < start + count; ++i)
      unsound |= !decltype(format)::sound(load_code<decltype(format)>(codes, i));
    return !unsound;
  });
}

bool all_zero(const uint8_t* begin, const uint8_t* end) {
  return std::all_of(begin, end, [](uint8_t byte) { return byte == 0; });
}

}  // namespace

PayloadReader::PayloadReader(const Payload& payload, int64_t rank)
    : shape_(payload.shape),
      rank_(rank),
      layout_(shape_),
      payload_(payload.data),
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
  bool clear = layout_.clear_after_bits(payload_, shape_);
  layout_.for_each_gap(
      [&](int64_t begin, int64_t end) { clear &= all_zero(payload_ + begin, payload_ + end); });
  if (!clear) fail("there are bits after the end of a section");
  with_wire_type(shape_.wire, [&](auto format) {
    using Format = decltype(format);
    if constexpr (Format::kScaled)
      for (uint32_t code = 0; code < 1u << Format::kBits; ++code)
        meaning_.push_back(Format::decode(code, header.scale));
  });
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
  return {index, view_.values, meaning_.data(), range.start, range.count};
}

void PayloadReader::fail(const std::string& what) const {
  throw DamagedPayload("payload of rank " + std::to_string(rank_) + " is damaged: " + what);
}

}  // namespace gmc::cpu
