// The wire format and the layout of an aggregate: one source for the CPU and the CUDA kernels.
// Torch-free, and free of the standard library beyond fixed-width integers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "numbers.h"

namespace gmc {

// A tile is what 16-bit local indices can address.
constexpr int64_t kTile = 65536;
constexpr int64_t kMaxNumel = 2147483647;

GMC_HD int64_t tile_count(int64_t numel) { return (numel + kTile - 1) / kTile; }
GMC_HD int64_t pad16(int64_t nbytes) { return (nbytes + 15) / 16 * 16; }

// ---------------------------------------------------------------------------------------------
// Payload: what one rank sends for one bucket. Little endian, every section padded with zeros to
// 16 bytes:
//   Header | starts uint32 [tiles] | tile-local indices uint16 [k], ascending | values [k]
// starts[t] is the number of entries in the tiles before t.
// ---------------------------------------------------------------------------------------------

// "GMC", format version 1 in the high half of the last byte, wire dtype in its low half.
constexpr uint32_t kPayloadMagic = 0x10434d47u;

GMC_HD uint32_t payload_tag(DType wire) {
  return kPayloadMagic | (static_cast<uint32_t>(wire) << 24);
}

struct PayloadHeader {
  uint32_t tag;
  uint32_t nonfinite;  // non-finite values this rank met; saturates at 2**32 - 1
  uint32_t k;
  uint32_t numel;
};
static_assert(sizeof(PayloadHeader) == 16, "the header is 16 bytes on the wire");

struct PayloadLayout {
  int64_t starts, indices, values, nbytes;  // byte offsets, and the whole size

  GMC_HD PayloadLayout(int64_t numel, int64_t k, DType wire)
      : starts(sizeof(PayloadHeader)),
        indices(starts + pad16(4 * tile_count(numel))),
        values(indices + pad16(2 * k)),
        nbytes(values + pad16(element_size(wire) * k)) {}
};

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

// Writes x in the wire dtype and returns what a reader of the payload will see.
GMC_HD float store_wire(void* values, DType wire, int64_t i, float x) {
  switch (wire) {
    case DType::kBFloat16: {
      const uint16_t h = float_to_bf16(x);
      static_cast<uint16_t*>(values)[i] = h;
      return bf16_to_float(h);
    }
    case DType::kFloat16: {
      const uint16_t h = float_to_fp16(x);
      static_cast<uint16_t*>(values)[i] = h;
      return fp16_to_float(h);
    }
    default:
      static_cast<float*>(values)[i] = x;
      return x;
  }
}

}  // namespace gmc
