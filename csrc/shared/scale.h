// The scale of a payload whose values are 8- or 4-bit codes: 2**scale is what a code of 1 means.
// It follows from the exponents of the selected entries alone, so that every backend finds the
// same.
//
// The largest code should be about as large as the largest entry. 4-bit codes span less than four
// octaves, so for them a few entries may lie above and saturate: the others are then rounded more
// finely. What saturation leaves in memory comes back larger at the next step, and would grow
// without bound if it always exceeded what one step may send; so once entries lie far above the
// others, nothing saturates.
#pragma once

#include "shared/numbers.h"

namespace gmc {

// An entry's exponent as float32 has it: 0 for zeros and denormals, 254 at most.
GMC_HD uint32_t exponent_field(uint32_t key) { return key >> 23; }

// How many of k entries may saturate.
GMC_HD int64_t may_saturate(WireType wire, int64_t k) {
  return wire == WireType::kFloat4 ? k / 256 : 0;
}

constexpr uint32_t kFarAbove = 6;  // octaves

// What the scale depends on: exponents of the k selected entries.
struct Exponents {
  uint32_t largest;  // exponent field
  uint32_t fitting;  // the smallest field that at most may_saturate(wire, k) entries exceed
};

template <class Format>
GMC_HD int wire_scale_as(const Exponents& exponents) {
  if constexpr (!Format::kScaled) {
    return 0;
  } else {
    const bool far = exponents.largest - exponents.fitting > kFarAbove;
    const uint32_t field = far ? exponents.largest : exponents.fitting;
    const int scale = static_cast<int>(field) - 127 - Format::kTop;
    return scale < Format::kSmallestScale ? Format::kSmallestScale : scale;
  }
}

GMC_HD int wire_scale(WireType wire, const Exponents& exponents) {
  return with_wire_type(wire,
                        [&](auto format) { return wire_scale_as<decltype(format)>(exponents); });
}

GMC_HD bool is_scaled(WireType wire) {
  return with_wire_type(wire, [](auto format) { return decltype(format)::kScaled; });
}

// True if a sound header can carry this scale.
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
