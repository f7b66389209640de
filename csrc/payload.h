// The wire format and the layout of an aggregate: one source for the CPU and the CUDA kernels, and
// the only check of their headers.
// Torch-free; of the standard library only what needs no code.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "numbers.h"

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
//   Header | starts uint32 [tiles] | tile-local indices uint16 [k], ascending | values [k]
// starts[t] is the number of entries in the tiles before t.
// ---------------------------------------------------------------------------------------------

// "GMC", format version 1 in the high half of the last byte, wire type in its low half.
constexpr uint32_t kPayloadMagic = 0x10434d47u;

GMC_HD uint32_t payload_tag(WireType wire) {
  return kPayloadMagic | (static_cast<uint32_t>(wire) << 24);
}

struct PayloadHeader {
  uint32_t tag;
  uint32_t nonfinite;  // non-finite values this rank met; saturates at 2**32 - 1
  uint32_t k;
  uint32_t numel;
};
static_assert(sizeof(PayloadHeader) == 16, "the header is 16 bytes on the wire");

// What fixes a payload's size and layout.
struct PayloadShape {
  int64_t numel, k;
  WireType wire;
};

GMC_HD PayloadHeader make_header(const PayloadShape& shape, uint32_t nonfinite) {
  return {payload_tag(shape.wire), nonfinite, static_cast<uint32_t>(shape.k),
          static_cast<uint32_t>(shape.numel)};
}

struct PayloadLayout {
  int64_t starts, starts_end, indices, indices_end, values, values_end, nbytes;  // in bytes

  GMC_HD explicit PayloadLayout(const PayloadShape& shape)
      : starts(sizeof(PayloadHeader)),
        starts_end(starts + 4 * tile_count(shape.numel)),
        indices(pad16(starts_end)),
        indices_end(indices + 2 * shape.k),
        values(pad16(indices_end)),
        values_end(values + wire_nbytes(shape.wire, shape.k)),
        nbytes(pad16(values_end)) {}

  // Calls function(begin, end) for the bytes of padding behind each section.
  GMC_ANY_SIDE
  template <class Function>
  GMC_HD void for_each_gap(const Function& function) const {
    function(starts_end, indices);
    function(indices_end, values);
    function(values_end, nbytes);
  }
};

// The sections of a payload. Byte: uint8_t to write, const uint8_t to read.
template <class Byte>
struct PayloadView {
  Like<PayloadHeader, Byte>* header;
  Like<uint32_t, Byte>* starts;
  Like<uint16_t, Byte>* indices;
  Byte* values;  // of the wire type

  GMC_HD PayloadView(Byte* payload, const PayloadLayout& layout)
      : header(at<PayloadHeader>(payload, 0)),
        starts(at<uint32_t>(payload, layout.starts)),
        indices(at<uint16_t>(payload, layout.indices)),
        values(payload + layout.values) {}
};

// Byte by byte, for bytes that are perhaps no payload and lie anywhere.
GMC_HD PayloadHeader read_header(const uint8_t* payload) {
  const auto word = [payload](int i) {
    const uint8_t* at = payload + 4 * i;
    return at[0] | at[1] << 8 | at[2] << 16 | static_cast<uint32_t>(at[3]) << 24;
  };
  return {word(0), word(1), word(2), word(3)};
}

// How a header contradicts what is expected of it.
enum class HeaderFault : uint32_t { kNone, kFormat, kK, kNumel, kSize };

// Of a payload whose shape is known.
GMC_HD HeaderFault header_fault(const PayloadHeader& header, const PayloadShape& expected) {
  if (header.tag != payload_tag(expected.wire)) return HeaderFault::kFormat;
  if (header.k != expected.k) return HeaderFault::kK;
  if (header.numel != expected.numel) return HeaderFault::kNumel;
  return HeaderFault::kNone;
}

// Of a payload of which only the size is known: it must describe one that has this size.
GMC_HD HeaderFault header_fault(const PayloadHeader& header, int64_t nbytes) {
  const uint32_t wire = (header.tag >> 24) & 0xfu;
  if (wire >= kWireTypes) return HeaderFault::kFormat;
  if (header.numel > kMaxNumel) return HeaderFault::kNumel;
  if (header.k < 1 || header.k > header.numel) return HeaderFault::kK;
  const PayloadShape shape{header.numel, header.k, static_cast<WireType>(wire)};
  if (PayloadLayout(shape).nbytes != nbytes) return HeaderFault::kSize;
  return header_fault(header, shape);
}

// A run of a payload's entries.
struct EntryRange {
  int64_t start, count;
};

// The entries of a tile; count is negative when the offsets contradict each other or k.
GMC_HD EntryRange tile_entries(const uint32_t* starts, const PayloadShape& shape, int64_t tile) {
  const int64_t start = starts[tile];
  const int64_t end = tile + 1 < tile_count(shape.numel) ? starts[tile + 1] : shape.k;
  const bool sound = end <= shape.k && (tile != 0 || start == 0);
  return {start, sound ? end - start : -1};
}

// ---------------------------------------------------------------------------------------------
// Aggregate: what merge makes of the payloads of all ranks. It stays on its device and is opaque
// outside this library:
//   Header | starts uint32 [tiles] | counts uint32 [tiles] | indices uint16 [capacity] |
//   values float32 [capacity]
// The entries of tile t lie at starts[t] .. starts[t] + counts[t], ascending, with gaps behind
// them: starts[t] = min(sum of the ranks' starts, 65536 t) leaves room for every tile and needs no
// prefix sum over the merged counts.
// ---------------------------------------------------------------------------------------------

constexpr uint32_t kAggregateMagic = 0x41434d47u;  // "GMCA"

// Bits of AggregateHeader::flags and of the verdict.
constexpr uint32_t kNonfinite = 1;
constexpr uint32_t kDamaged = 2;

GMC_HD uint32_t verdict_flags(const PayloadHeader& header, int64_t nbytes) {
  return (header_fault(header, nbytes) == HeaderFault::kNone ? 0 : kDamaged) |
         (header.nonfinite != 0 ? kNonfinite : 0);
}

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
  int64_t starts, counts, indices, values, nbytes;

  GMC_HD AggregateLayout(int64_t numel, int64_t capacity)
      : starts(sizeof(AggregateHeader)),
        counts(starts + pad16(4 * tile_count(numel))),
        indices(counts + pad16(4 * tile_count(numel))),
        values(indices + pad16(2 * capacity)),
        nbytes(values + pad16(4 * capacity)) {}
};

// The sections of an aggregate. Byte: uint8_t to write, const uint8_t to read.
template <class Byte>
struct AggregateView {
  Like<AggregateHeader, Byte>* header;
  Like<uint32_t, Byte>* starts;
  Like<uint32_t, Byte>* counts;
  Like<uint16_t, Byte>* indices;
  Like<float, Byte>* values;

  GMC_HD AggregateView(Byte* aggregate, const AggregateLayout& layout)
      : header(at<AggregateHeader>(aggregate, 0)),
        starts(at<uint32_t>(aggregate, layout.starts)),
        counts(at<uint32_t>(aggregate, layout.counts)),
        indices(at<uint16_t>(aggregate, layout.indices)),
        values(at<float>(aggregate, layout.values)) {}
};

// Whether the bytes are an aggregate for numel elements.
GMC_HD bool sound_aggregate(const AggregateHeader& header, int64_t numel, int64_t nbytes) {
  return header.tag == kAggregateMagic && header.numel == numel &&
         AggregateLayout(numel, header.capacity).nbytes == nbytes;
}

}  // namespace gmc
