// Reading a payload that came over a wire: nothing in it is believed before it was checked.
#pragma once

#include <string>

#include "kernels.h"

namespace gmc::cpu {

struct PayloadEntries {
  const uint16_t* indices;
  const uint8_t* values;
  int64_t start, count;
};

class PayloadReader {
 public:
  // Throws DamagedPayload when the header is not that of this bucket's payload.
  PayloadReader(const PayloadArgs& args, int64_t rank)
      : numel_(args.numel),
        k_(args.k),
        wire_(args.wire),
        rank_(rank),
        layout_(args.numel, args.k, args.wire) {
    data_ = args.data + rank * layout_.nbytes;
    header_ = reinterpret_cast<const PayloadHeader*>(data_);
    if (header_->tag != payload_tag(wire_)) fail("its header has another format or wire dtype");
    if (header_->k != k_)
      fail("it says k = " + std::to_string(header_->k) + ", not " + std::to_string(k_));
    if (header_->numel != numel_)
      fail("it says numel = " + std::to_string(header_->numel) + ", not " + std::to_string(numel_));
  }

  uint32_t nonfinite() const { return header_->nonfinite; }

  // Throws DamagedPayload unless the tile's entries lie within the payload, its indices ascend
  // within the tile, and its values are finite.
  PayloadEntries tile(int64_t tile) const {
    const auto* starts = reinterpret_cast<const uint32_t*>(data_ + layout_.starts);
    const int64_t tiles = tile_count(numel_);
    const int64_t start = starts[tile];
    const int64_t end = tile + 1 < tiles ? starts[tile + 1] : k_;
    if (start > end || end > k_ || (tile == 0 && start != 0))
      fail("the start offsets of tile " + std::to_string(tile) + " are out of order");
    const PayloadEntries entries{reinterpret_cast<const uint16_t*>(data_ + layout_.indices) + start,
                                 data_ + layout_.values + start * element_size(wire_), start,
                                 end - start};
    const int64_t size = tile + 1 < tiles ? kTile : numel_ - tile * kTile;
    if (!ascending(entries, size) || !finite(entries))
      fail("tile " + std::to_string(tile) + " holds indices or values out of range");
    return entries;
  }

  float value(const PayloadEntries& entries, int64_t i) const {
    return load_value(entries.values, wire_, i);
  }

 private:
  static bool ascending(const PayloadEntries& entries, int64_t size) {
    bool sound = true;
    for (int64_t i = 1; i < entries.count; ++i)
      sound &= entries.indices[i] > entries.indices[i - 1];
    return sound && (entries.count == 0 || entries.indices[entries.count - 1] < size);
  }

  bool finite(const PayloadEntries& entries) const {
    const auto below = [&](const auto* words, uint32_t magnitude, uint32_t infinity) {
      bool sound = true;
      for (int64_t i = 0; i < entries.count; ++i) sound &= (words[i] & magnitude) < infinity;
      return sound;
    };
    if (wire_ == DType::kFloat32)
      return below(reinterpret_cast<const uint32_t*>(entries.values), 0x7fffffffu, kInfKey);
    const auto* halves = reinterpret_cast<const uint16_t*>(entries.values);
    return below(halves, 0x7fffu, wire_ == DType::kBFloat16 ? 0x7f80u : 0x7c00u);
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw DamagedPayload("payload of rank " + std::to_string(rank_) + " is damaged: " + what);
  }

  const int64_t numel_, k_;
  const DType wire_;
  const int64_t rank_;
  const PayloadLayout layout_;
  const uint8_t* data_;
  const PayloadHeader* header_;
};

}  // namespace gmc::cpu
