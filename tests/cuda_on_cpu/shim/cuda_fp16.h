// binary16: conversions only, rounding to nearest even. Kernels calculate in float.
#pragma once

#include "cuda_runtime.h"

struct __half_raw {
  unsigned short x;
};
struct alignas(2) __half {
  unsigned short __x;
  __half() = default;
  explicit __half(float value);
  __half(__half_raw raw) : __x(raw.x) {}
  operator __half_raw() const { return {__x}; }
  explicit operator float() const;
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

inline unsigned short __half_as_ushort(__half value) { return value.__x; }
inline __half __ushort_as_half(unsigned short bits) { return __half(__half_raw{bits}); }

inline float __half2float(__half value) {
  const unsigned sign = (value.__x & 0x8000u) << 16;
  const unsigned exponent = value.__x >> 10 & 0x1fu, fraction = value.__x & 0x3ffu;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  const float magnitude = exponent == 0 ? ldexpf(float(fraction), -24)
                                        : ldexpf(float(1024 + fraction), int(exponent) - 25);
  return __uint_as_float(sign | __float_as_uint(magnitude));
}

inline __half __float2half_rn(float value) {
  const unsigned bits = __float_as_uint(value);
  const unsigned sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  unsigned result;
  if (magnitude > 0x7f800000u) {
    return __ushort_as_half(0x7fff);
  } else if (magnitude >= 0x47800000u) {  // 65536 and above
    result = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // a denormal: a multiple of 2**-24
    result = unsigned(nearbyintf(ldexpf(__uint_as_float(magnitude), 24)));
  } else {  // a carry out of the fraction goes into the exponent, as it must
    result = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
  }
  return __ushort_as_half((unsigned short)(sign | result));
}
inline __half __float2half(float value) { return __float2half_rn(value); }

inline __half::__half(float value) : __x(__float2half_rn(value).__x) {}
inline __half::operator float() const { return __half2float(*this); }
