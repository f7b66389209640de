// Reads a payload that came over a wire. Nothing in it is believed before it was checked.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "shared/bucket.h"

namespace gmc::cpu {

// A payload whose header, offsets, indices or values contradict each other.
struct DamagedPayload : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct PayloadEntries {
  const uint16_t* indices;  // within the tile, ascending; where they were decoded to
  const uint8_t* codes;     // of the whole payload: entry i of the tile has code start + i
  const float* meaning;     // of each code, where the wire type has a scale
  int64_t start, count;

  template <class Format>
  float value(int64_t entry) const {
    const uint32_t code = load_code<Format>(codes, start + entry);
    if constexpr (Format::kScaled) return meaning[code];
    return Format::decode(code, 0);
  }
};

// Where a tile's indices are decoded to.
struct TileIndices {
  std::vector<uint8_t> block = std::vector<uint8_t>(kTile + 8);  // the last is written as 8 bytes
  std::vector<uint16_t> index = std::vector<uint16_t>(kTile);
};

class PayloadReader {
 public:
  // rank: whose payload it is, for errors. Throws DamagedPayload when the header is not that of
  // this bucket's payload, or there is more than zeros between the sections.
  PayloadReader(const Payload& payload, int64_t rank);

  uint32_t nonfinite() const { return view_.header->nonfinite; }

  // Throws DamagedPayload unless the tile's entries lie within the payload, its bits end as many
  // blocks as it has, its indices ascend within the tile, and its values are finite. `indices` is
  // overwritten.
  PayloadEntries tile(int64_t tile, TileIndices* indices) const;

 private:
  [[noreturn]] void fail(const std::string& what) const;

  const PayloadShape shape_;
  const int64_t rank_;
  const PayloadLayout layout_;
  const uint8_t* const payload_;
  const PayloadView<const uint8_t> view_;
  std::vector<float> meaning_;
};

}  // namespace gmc::cpu
