// A 64-bit fingerprint of a tensor's bits: the sum of one mixed term for each element, so that
// every bit and its place count, but not how the elements are shared out between threads.
#pragma once

#include "numbers.h"

namespace gmc {

// The finaliser of SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number
// Generators", OOPSLA 2014).
GMC_HD uint64_t fingerprint_term(uint64_t index, uint32_t bits) {
  uint64_t x = (index << 32 | bits) + 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

GMC_HD uint64_t fingerprint_term(const void* data, DType dtype, int64_t i) {
  const uint32_t bits = element_size(dtype) == 4 ? static_cast<const uint32_t*>(data)[i]
                                                 : static_cast<const uint16_t*>(data)[i];
  return fingerprint_term(static_cast<uint64_t>(i), bits);
}

}  // namespace gmc
