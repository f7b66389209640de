// Number formats, by integer arithmetic so that every backend rounds alike.
// Torch-free, and free of the standard library beyond fixed-width integers.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GMC_HD __host__ __device__ __forceinline__
#else
#define GMC_HD inline __attribute__((always_inline))
#endif

namespace gmc {

enum class DType : uint32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

GMC_HD int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

GMC_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

GMC_HD float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// Orders values by magnitude: larger key, larger |x|; infinities and NaN lie at kInfKey and above.
constexpr uint32_t kInfKey = 0x7f800000u;
GMC_HD uint32_t magnitude_key(float x) { return float_bits(x) & 0x7fffffffu; }
GMC_HD bool is_finite(float x) { return magnitude_key(x) < kInfKey; }

GMC_HD float bf16_to_float(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

GMC_HD float fp16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t shifted = static_cast<uint32_t>(h & 0x7fffu) << 13;
  // Multiplying by 2**112 moves the exponent bias and normalises denormals exactly.
  const uint32_t finite = float_bits(bits_float(shifted) * 5192296858534827628530496329220096.0f);
  const uint32_t magnitude = shifted >= (31u << 23) ? (shifted | kInfKey) : finite;
  return bits_float(sign | magnitude);
}

// Both round to nearest even, and saturate at the largest finite value. x must be finite.
GMC_HD uint16_t float_to_bf16(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool overflow = (rounded & 0x7fffu) >= 0x7f80u;
  return static_cast<uint16_t>(overflow ? ((rounded & 0x8000u) | 0x7f7fu) : rounded);
}

GMC_HD uint16_t float_to_fp16(float x) {
  const uint32_t sign = (float_bits(x) >> 16) & 0x8000u;
  uint32_t bits = magnitude_key(x);
  const uint32_t largest = 0x477fe000u;  // 65504
  bits = bits < largest ? bits : largest;
  // Below 2**-14 the spacing is 2**-24, which is float32's spacing at 0.5.
  const uint32_t denormal = float_bits(bits_float(bits) + 0.5f) - 0x3f000000u;
  const uint32_t normal = ((bits + 0xfffu + ((bits >> 13) & 1u)) >> 13) - (112u << 10);
  return static_cast<uint16_t>(sign | (bits < (113u << 23) ? denormal : normal));
}

GMC_HD float load_value(const void* values, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kBFloat16:
      return bf16_to_float(static_cast<const uint16_t*>(values)[i]);
    case DType::kFloat16:
      return fp16_to_float(static_cast<const uint16_t*>(values)[i]);
    default:
      return static_cast<const float*>(values)[i];
  }
}

// Parameters round to nearest even as well, but overflow to infinity and keep NaN, like torch.
GMC_HD void store_param(void* params, DType dtype, int64_t i, float x) {
  const uint32_t key = magnitude_key(x);
  const uint16_t sign = static_cast<uint16_t>((float_bits(x) >> 16) & 0x8000u);
  if (dtype == DType::kFloat32) {
    static_cast<float*>(params)[i] = x;
  } else if (dtype == DType::kBFloat16) {
    const uint32_t rounded = (key + 0x7fffu + ((key >> 16) & 1u)) >> 16;
    static_cast<uint16_t*>(params)[i] = key > kInfKey ? 0x7fc0u : (sign | rounded);
  } else {
    const uint16_t special = key > kInfKey ? 0x7e00u : 0x7c00u;
    const uint32_t overflow = 0x477ff000u;  // 65520, half-way from 65504 to the next step
    static_cast<uint16_t*>(params)[i] = key >= overflow ? (sign | special) : float_to_fp16(x);
  }
}

}  // namespace gmc
