// Reading a payload that came over a wire: nothing in it is believed before it was checked.
#pragma once

#include <string>

#include "kernels.h"

namespace gmc::cpu {

struct PayloadEntries {
  const uint16_t* indices;
  const uint8_t* values;  // of the wire type
  int64_t start, count;
};

class PayloadReader {
 public:
  // Throws DamagedPayload when the header is not that of this bucket's payload.
  PayloadReader(const Payload& payloads, int64_t rank)
      : shape_(payloads.shape), rank_(rank), view_(view_of(payloads, rank)) {
    const PayloadHeader& header = *view_.header;
    switch (header_fault(header, shape_)) {
      case HeaderFault::kNone:
        break;
      case HeaderFault::kK:
        fail("it says k = " + std::to_string(header.k) + ", not " + std::to_string(shape_.k));
      case HeaderFault::kNumel:
        fail("it says numel = " + std::to_string(header.numel) + ", not " +
             std::to_string(shape_.numel));
      default:
        fail("its header has another format or wire dtype");
    }
  }

  uint32_t nonfinite() const { return view_.header->nonfinite; }

  // Throws DamagedPayload unless the tile's entries lie within the payload, its indices ascend
  // within the tile, and its values are finite.
  PayloadEntries tile(int64_t tile) const {
    const EntryRange range = tile_entries(view_.starts, shape_, tile);
    if (range.count < 0)
      fail("the start offsets of tile " + std::to_string(tile) + " are out of order");
    const PayloadEntries entries{view_.indices + range.start,
                                 view_.values + wire_nbytes(shape_.wire, range.start), range.start,
                                 range.count};
    if (!ascending(entries, tile_size(shape_.numel, tile)) || !finite(entries))
      fail("tile " + std::to_string(tile) + " holds indices or values out of range");
    return entries;
  }

 private:
  static PayloadView<const uint8_t> view_of(const Payload& payloads, int64_t rank) {
    const PayloadLayout layout(payloads.shape);
    return {payloads.data + rank * layout.nbytes, layout};
  }

  static bool ascending(const PayloadEntries& entries, int64_t size) {
    bool sound = true;
    for (int64_t i = 1; i < entries.count; ++i)
      sound &= entries.indices[i] > entries.indices[i - 1];
    return sound && (entries.count == 0 || entries.indices[entries.count - 1] < size);
  }

  bool finite(const PayloadEntries& entries) const {
    return with_wire_type(shape_.wire, [&](auto format) {
      bool sound = true;
      for (int64_t i = 0; i < entries.count; ++i)
        sound &= sound_wire_as<decltype(format)>(entries.values, i);
      return sound;
    });
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw DamagedPayload("payload of rank " + std::to_string(rank_) + " is damaged: " + what);
  }

  const PayloadShape shape_;
  const int64_t rank_;
  const PayloadView<const uint8_t> view_;
};

}  // namespace gmc::cpu
