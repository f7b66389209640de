// Reading a payload that came over a wire: nothing in it is believed before it was checked.
#pragma once

#include <cuda_runtime.h>

#include "payload.h"

namespace gmc::cuda {

// One payload, or those of several ranks one behind the other.
struct Payload {
  const uint8_t* data;
  int64_t numel, k;
  DType wire;
};

__device__ __forceinline__ uint32_t tile_size(int64_t numel, int64_t tile) {
  const int64_t left = numel - tile * kTile;
  return static_cast<uint32_t>(left < kTile ? left : kTile);
}

// A payload's entries that belong to one wire tile.
struct PayloadTile {
  const uint16_t* indices;
  const void* values;
  uint32_t start, count;
  DType wire;

  __device__ float value(uint32_t entry) const { return load_value(values, wire, entry); }

  // Whether an entry lies within the tile, behind its predecessor, and is finite.
  __device__ bool sound(uint32_t entry, uint32_t size) const {
    const uint32_t index = indices[entry];
    return index < size && (entry == 0 || indices[entry - 1] < index) && is_finite(value(entry));
  }
};

// False when the header or the tile's offsets contradict this bucket; the tile is then empty.
__device__ __forceinline__ bool open_tile(const Payload& payload, int64_t rank, int64_t tile,
                                          PayloadTile* out) {
  const PayloadLayout layout(payload.numel, payload.k, payload.wire);
  const uint8_t* data = payload.data + rank * layout.nbytes;
  const auto* header = reinterpret_cast<const PayloadHeader*>(data);
  const auto* starts = reinterpret_cast<const uint32_t*>(data + layout.starts);
  const int64_t start = starts[tile];
  const int64_t end = tile + 1 < tile_count(payload.numel) ? starts[tile + 1] : payload.k;
  const bool sound = header->tag == payload_tag(payload.wire) && header->k == payload.k &&
                     header->numel == payload.numel && start <= end && end <= payload.k &&
                     end - start <= kTile && (tile != 0 || start == 0);
  out->indices = reinterpret_cast<const uint16_t*>(data + layout.indices) + (sound ? start : 0);
  out->values = data + layout.values + (sound ? start : 0) * element_size(payload.wire);
  out->start = sound ? static_cast<uint32_t>(start) : 0;
  out->count = sound ? static_cast<uint32_t>(end - start) : 0;
  out->wire = payload.wire;
  return sound;
}

}  // namespace gmc::cuda
