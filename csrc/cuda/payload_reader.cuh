// Reading a payload that came over a wire: nothing in it is believed before it was checked.
#pragma once

#include <cuda_runtime.h>

#include "bucket.h"

namespace gmc::cuda {

// A payload's entries that belong to one wire tile.
struct PayloadTile {
  const uint16_t* indices;
  const void* values;
  uint32_t start, count;
  WireType wire;

  __device__ float value(uint32_t entry) const { return load_wire(values, wire, entry); }

  // Whether an entry is within the tile, behind its predecessor, and finite.
  __device__ bool sound(uint32_t entry, uint32_t size) const {
    const uint32_t index = indices[entry];
    return index < size && (entry == 0 || indices[entry - 1] < index) && is_finite(value(entry));
  }
};

// False when the header or the tile's offsets contradict this bucket; the tile is then empty.
__device__ __forceinline__ bool open_tile(const Payload& payload, int64_t rank, int64_t tile,
                                          PayloadTile* out) {
  const PayloadShape& shape = payload.shape;
  const PayloadLayout layout(shape);
  const PayloadView view(payload.data + rank * layout.nbytes, layout);
  EntryRange range = tile_entries(view.starts, shape, tile);
  const bool sound = header_fault(*view.header, shape) == HeaderFault::kNone && range.count >= 0;
  if (!sound) range = {0, 0};
  out->indices = view.indices + range.start;
  out->values = view.values + wire_nbytes(shape.wire, range.start);
  out->start = static_cast<uint32_t>(range.start);
  out->count = static_cast<uint32_t>(range.count);
  out->wire = shape.wire;
  return sound;
}

}  // namespace gmc::cuda
