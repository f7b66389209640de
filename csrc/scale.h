// The scale of a payload whose values are 8- or 4-bit codes: 2**scale is what a code of 1 means.
// It is anchored by the exponents of the selected entries alone, so that every backend finds the
// same.
#pragma once

#include "numbers.h"

namespace gmc {

// An entry's exponent as float32 has it: 0 for zeros and denormals, 254 at most.
GMC_HD uint32_t exponent_field(uint32_t key) { return key >> 23; }

// How many of k entries may lie above the range of the codes, where they saturate.
GMC_HD int64_t may_saturate(int64_t k) { return k / 64; }

// field: the smallest with at most may_saturate(k) entries of a larger exponent field. kth: the
// smallest key selected. The range ends at the exponent of `field`, or begins at that of the k-th.
template <class Format>
GMC_HD int wire_scale_as(uint32_t field, uint32_t kth) {
  if constexpr (!Format::kScaled) {
    return 0;
  } else {
    const int top = static_cast<int>(field) - 127 - Format::kTop;
    const int bottom = static_cast<int>(exponent_field(kth)) - 127;
    const int scale = top > bottom ? top : bottom;
    const int smallest = Format::kSmallestScale, largest = Format::kLargestScale;
    return scale < smallest ? smallest : scale > largest ? largest : scale;
  }
}

GMC_HD int wire_scale(WireType wire, uint32_t field, uint32_t kth) {
  return with_wire_type(wire,
                        [=](auto format) { return wire_scale_as<decltype(format)>(field, kth); });
}

GMC_HD bool is_scaled(WireType wire) {
  return with_wire_type(wire, [](auto format) { return decltype(format)::kScaled; });
}

// Whether a header may say so.
GMC_HD bool sound_scale(WireType wire, int scale) {
  return with_wire_type(wire, [=](auto format) {
    using Format = decltype(format);
    if constexpr (Format::kScaled) {
      return Format::kSmallestScale <= scale && scale <= Format::kLargestScale;
    } else {
      return scale == 0;
    }
  });
}

}  // namespace gmc
