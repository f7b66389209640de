// The wire format and the layout of an aggregate: one source for the CPU and the CUDA kernels, and
// the only check of their headers. It knows no torch, and of the standard library only what needs
// no code.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "shared/numbers.h"
#include "shared/scale.h"

namespace gmc {

// A tile is what 16-bit local indices can address.
constexpr int64_t kTile = 65536;
constexpr int64_t kMaxNumel = 2147483647;

GMC_HD int64_t tile_count(int64_t numel) { return (numel + kTile - 1) / kTile; }
GMC_HD int64_t tile_size(int64_t numel, int64_t tile) {
  const int64_t left = numel - tile * kTile;
  return left < kTile ? left : kTile;
}
GMC_HD int64_t pad16(int64_t nbytes) { return (nbytes + 15) / 16 * 16; }

// T, or const T where Byte is const.
template <class T, class Byte>
using Like = std::conditional_t<std::is_const_v<Byte>, const T, T>;

// The T that lie `offset` bytes into a buffer.
template <class T, class Byte>
GMC_HD Like<T, Byte>* at(Byte* bytes, int64_t offset) {
  return reinterpret_cast<Like<T, Byte>*>(bytes + offset);
}

// ---------------------------------------------------------------------------------------------
// Payload: what one rank sends for one bucket. Little endian, every section padded with zeros to
// 16 bytes:
//   Header | starts uint32 [tiles] | low bytes of indices [k] | bitmap | codes of values [k]
// starts[t] is the number of entries in the tiles before t. The bitmap has, for each block of 256
// elements, a 1 for every entry and then a 0, from the lowest bit of a byte up (Elias-Fano with 8
// low bits). So entry i of block b is bit i + b, and the bits of tile t begin at starts[t] + 256 t.
// ---------------------------------------------------------------------------------------------

// A block is what the low byte of an index can address.
constexpr int64_t kBlock = 256;
constexpr int64_t kTileBlocks = kTile / kBlock;

GMC_HD int64_t block_count(int64_t numel) { return (numel + kBlock - 1) / kBlock; }

// "GMC", format version 2 in the high half of the last byte, wire type in its low half.
constexpr uint32_t kPayloadMagic = 0x20434d47u;

GMC_HD uint32_t payload_magic(WireType wire) {
  return kPayloadMagic | (static_cast<uint32_t>(wire) << 24);
}

// Tags are numbers that a float32 holds exactly, because those of dense buckets travel as one.
constexpr uint32_t kTags = 1u << 24;
constexpr uint32_t kCalledOff = 1;

struct PayloadHeader {
  uint32_t magic;
  uint32_t nonfinite;  // non-finite values this rank met; saturates at 2**32 - 1
  uint32_t k;
  uint32_t numel;
  int32_t scale;  // codes of 8 and 4 bits count from 2**scale; 0 for others
  uint32_t tag;   // what the sender says that this is for; kCalledOff: its step does not happen
};
static_assert(sizeof(PayloadHeader) == 24, "the header is 24 bytes on the wire");

// What fixes a payload's size and layout.
struct PayloadShape {
  int64_t numel, k;
  WireType wire;
};

GMC_HD PayloadHeader make_header(const PayloadShape& shape, uint32_t nonfinite, int scale,
                                 uint32_t tag) {
  const auto k = static_cast<uint32_t>(shape.k), numel = static_cast<uint32_t>(shape.numel);
  return {payload_magic(shape.wire), nonfinite, k, numel, scale, tag};
}

struct PayloadLayout {
  int64_t starts, starts_end, low, low_end, bitmap, bits, bitmap_end, values, values_end, nbytes;

  // All are in bytes except `bits`, the length of the bitmap.
  GMC_HD explicit PayloadLayout(const PayloadShape& shape)
      : starts(pad16(sizeof(PayloadHeader))),
        starts_end(starts + 4 * tile_count(shape.numel)),
        low(pad16(starts_end)),
        low_end(low + shape.k),
        bitmap(pad16(low_end)),
        bits(shape.k + block_count(shape.numel)),
        bitmap_end(bitmap + (bits + 7) / 8),
        values(pad16(bitmap_end)),
        values_end(values + wire_nbytes(shape.wire, shape.k)),
        nbytes(pad16(values_end)) {}

  // Calls function(begin, end) for the bytes of padding after each section.
  GMC_ANY_SIDE
  template <class Function>
  GMC_HD void for_each_gap(const Function& function) const {
    function(static_cast<int64_t>(sizeof(PayloadHeader)), starts);
    function(starts_end, low);
    function(low_end, bitmap);
    function(bitmap_end, values);
    function(values_end, nbytes);
  }

  // Whether the bits after the last one of the bitmap and of the values are zero, within the bytes
  // that these share.
  GMC_HD bool clear_after_bits(const uint8_t* payload, const PayloadShape& shape) const {
    const bool half = shape.wire == WireType::kFloat4 && shape.k % 2 != 0;
    return (bits % 8 == 0 || payload[bitmap_end - 1] >> (bits % 8) == 0) &&
           (!half || payload[values_end - 1] >> 4 == 0);
  }
};

// The sections of a payload. Byte: uint8_t to write, const uint8_t to read.
template <class Byte>
struct PayloadView {
  Like<PayloadHeader, Byte>* header;
  Like<uint32_t, Byte>* starts;
  Byte* low;
  Byte* bitmap;  // aligned to 16 bytes, and all of the last 16 may be read
  Byte* values;  // codes of the wire type

  GMC_HD PayloadView(Byte* payload, const PayloadLayout& layout)
      : header(at<PayloadHeader>(payload, 0)),
        starts(at<uint32_t>(payload, layout.starts)),
        low(payload + layout.low),
        bitmap(payload + layout.bitmap),
        values(payload + layout.values) {}
};

// Reads a header byte by byte, from bytes that are perhaps no payload and have any alignment.
GMC_HD PayloadHeader read_header(const uint8_t* payload) {
  const auto word = [payload](int i) {
    const uint8_t* at = payload + 4 * i;
    return at[0] | at[1] << 8 | at[2] << 16 | static_cast<uint32_t>(at[3]) << 24;
  };
  return {word(0), word(1), word(2), word(3), static_cast<int32_t>(word(4)), word(5)};
}

// How a header contradicts what is expected of it. A tag contradicts nothing: the verdict compares
// it with those of the other ranks.
enum class HeaderFault : uint32_t { kNone, kFormat, kK, kNumel, kSize, kScale };

// The fault of a payload whose shape is known.
GMC_HD HeaderFault header_fault(const PayloadHeader& header, const PayloadShape& expected) {
  if (header.magic != payload_magic(expected.wire)) return HeaderFault::kFormat;
  if (header.k != expected.k) return HeaderFault::kK;
  if (header.numel != expected.numel) return HeaderFault::kNumel;
  if (!sound_scale(expected.wire, header.scale)) return HeaderFault::kScale;
  return HeaderFault::kNone;
}

// The fault of a payload of which only the size is known: its header must describe one of this
// size.
GMC_HD HeaderFault header_fault(const PayloadHeader& header, int64_t nbytes) {
  const uint32_t wire = (header.magic >> 24) & 0xfu;
  if (wire >= kWireTypes) return HeaderFault::kFormat;
  if (header.numel > kMaxNumel) return HeaderFault::kNumel;
  if (header.k < 1 || header.k > header.numel) return HeaderFault::kK;
  const PayloadShape shape{header.numel, header.k, static_cast<WireType>(wire)};
  if (PayloadLayout(shape).nbytes != nbytes) return HeaderFault::kSize;
  return header_fault(header, shape);
}

// A tile's part of a payload: its entries, and its bits in the bitmap.
struct TileRange {
  int64_t start, count;      // entries; count is negative when the offsets contradict each other
  int64_t bit, bits, zeros;  // first bit, how many, how many of them end a block
};

GMC_HD TileRange tile_range(const uint32_t* starts, const PayloadShape& shape, int64_t tile) {
  const bool last = tile + 1 == tile_count(shape.numel);
  const int64_t start = starts[tile];
  const int64_t end = last ? shape.k : starts[tile + 1];
  const int64_t zeros = last ? block_count(shape.numel) - tile * kTileBlocks : kTileBlocks;
  const bool sound = start <= end && end <= shape.k && (tile != 0 || start == 0);
  if (!sound) return {0, -1, 0, 0, zeros};
  return {start, end - start, start + tile * kTileBlocks, end - start + zeros, zeros};
}

// ---------------------------------------------------------------------------------------------
// Aggregate: what merge makes of the payloads of all ranks. It stays on its device and is opaque
// outside this library:
//   Header | starts uint32 [tiles] | counts uint32 [tiles] | runs uint16 [16 tiles] |
//   indices uint16 [capacity] | values float32 [capacity]
// The entries of tile t lie at starts[t] .. starts[t] + counts[t], ascending, with gaps after them:
// starts[t] = min(sum of the ranks' starts, 65536 t) leaves room for every tile and needs no prefix
// sum over the merged counts. Where counts[t] is not zero, runs[16 t + i] of them lie before the
// i-th run of 4096 elements of the tile, so that a kernel that works on less than a tile finds its
// entries.
// ---------------------------------------------------------------------------------------------

constexpr int64_t kAggregateRun = 4096;
constexpr int64_t kTileRuns = kTile / kAggregateRun;

constexpr uint32_t kAggregateMagic = 0x41434d47u;  // "GMCA"

// Bits of AggregateHeader::flags and of the verdict.
constexpr uint32_t kNonfinite = 1;
constexpr uint32_t kDamaged = 2;
// Bits of the verdict alone.
constexpr uint32_t kMismatch = 4;  // two ranks' tags differ
constexpr uint32_t kOff = 8;       // a rank called its step off

// The bits of a verdict that Skip::flags keeps: all but non-finite values, which are counted.
constexpr uint32_t kKept = kDamaged | kMismatch | kOff;

// What the ranks say of one bucket. They are compared with each other, never with the rank that
// computes the verdict: all ranks received the same bytes, so all come to the same verdict.
struct BucketVerdict {
  uint32_t flags = 0;
  uint32_t least = ~0u, largest = 0;  // of the tags' words, so that none, one or equal ones agree

  // A damaged header may say anything, so its tag says nothing.
  GMC_HD void add(const PayloadHeader& header, int64_t nbytes) {
    if (header.nonfinite != 0) flags |= kNonfinite;
    if (header_fault(header, nbytes) != HeaderFault::kNone) {
      flags |= kDamaged;
    } else {
      add_tag(header.tag, kCalledOff);
    }
  }

  // Adds the numbers that stand for a header where a bucket is sent whole. The tag is compared by
  // its bits, because a sum that went wrong may not be a number.
  GMC_HD void add(float nonfinite, float tag) {
    if (nonfinite != 0.0f) flags |= kNonfinite;
    add_tag(float_bits(tag), float_bits(static_cast<float>(kCalledOff)));
  }

  GMC_HD uint32_t result() const { return flags | (least < largest ? kMismatch : 0); }

 private:
  GMC_HD void add_tag(uint32_t word, uint32_t called_off) {
    if (word == called_off) {
      flags |= kOff;
    } else {
      least = word < least ? word : least;
      largest = word > largest ? word : largest;
    }
  }
};

struct AggregateHeader {
  uint32_t tag;
  uint32_t flags;
  uint32_t capacity;
  uint32_t numel;
};
static_assert(sizeof(AggregateHeader) == 16, "the header is 16 bytes");

GMC_HD int64_t aggregate_capacity(int64_t numel, int64_t k, int64_t ranks) {
  return ranks > numel / k ? numel : ranks * k;
}

struct AggregateLayout {
  int64_t starts, counts, runs, indices, values, nbytes;  // the first three depend on numel alone

  GMC_HD AggregateLayout(int64_t numel, int64_t capacity)
      : starts(sizeof(AggregateHeader)),
        counts(starts + pad16(4 * tile_count(numel))),
        runs(counts + pad16(4 * tile_count(numel))),
        indices(runs + pad16(2 * kTileRuns * tile_count(numel))),
        values(indices + pad16(2 * capacity)),
        nbytes(values + pad16(4 * capacity)) {}
};

// The sections of an aggregate. Byte: uint8_t to write, const uint8_t to read.
template <class Byte>
struct AggregateView {
  Like<AggregateHeader, Byte>* header;
  Like<uint32_t, Byte>* starts;
  Like<uint32_t, Byte>* counts;
  Like<uint16_t, Byte>* runs;
  Like<uint16_t, Byte>* indices;
  Like<float, Byte>* values;

  GMC_HD AggregateView(Byte* aggregate, const AggregateLayout& layout)
      : header(at<AggregateHeader>(aggregate, 0)),
        starts(at<uint32_t>(aggregate, layout.starts)),
        counts(at<uint32_t>(aggregate, layout.counts)),
        runs(at<uint16_t>(aggregate, layout.runs)),
        indices(at<uint16_t>(aggregate, layout.indices)),
        values(at<float>(aggregate, layout.values)) {}
};

}  // namespace gmc
