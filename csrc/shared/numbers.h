// Number formats, by integer arithmetic so that every backend rounds alike: what parameters and
// gradients are stored as (DType), and what values are sent as (WireType). It knows no torch, and
// of the standard library only fixed-width integers.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GMC_HD __host__ __device__ __forceinline__
// Marks templates that call the function they are given, on host or device.
#define GMC_ANY_SIDE _Pragma("nv_exec_check_disable")
#else
#define GMC_HD inline __attribute__((always_inline))
#define GMC_ANY_SIDE
#endif

namespace gmc {

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
constexpr uint32_t kKeyMask = 0x7fffffffu;
GMC_HD uint32_t magnitude_key(float x) { return float_bits(x) & kKeyMask; }

GMC_HD bool is_finite(float x) {
#if defined(__CUDA_ARCH__)
  // Compares floats, not keys: the absolute value costs no instruction and no register.
  return fabsf(x) < bits_float(kInfKey);
#else
  return magnitude_key(x) < kInfKey;
#endif
}

GMC_HD float finite_or_zero(float x) { return is_finite(x) ? x : 0.0f; }

GMC_HD float bf16_to_float(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

GMC_HD float fp16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t shifted = static_cast<uint32_t>(h & 0x7fffu) << 13;
  // Multiplying by 2**112 moves the exponent bias and normalises denormals exactly.
  const uint32_t finite = float_bits(bits_float(shifted) * 5192296858534827628530496329220096.0f);
  const uint32_t magnitude = shifted >= (31u << 23) ? (shifted | kInfKey) : finite;
  return bits_float(sign | magnitude);
}

// float_to_bf16 and float_to_fp16 round to nearest even, and saturate at the largest finite value.
// x must be finite.
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

// ---------------------------------------------------------------------------------------------
// Parameters and gradients. Their formats round to nearest even too, but overflow to infinity and
// keep NaN, like torch.
// ---------------------------------------------------------------------------------------------

enum class DType : uint32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Float32 {
  using Word = float;
  static GMC_HD float to_float(Word word) { return word; }
  static GMC_HD Word round(float x) { return x; }
};

struct BFloat16 {
  using Word = uint16_t;
  static GMC_HD float to_float(Word word) { return bf16_to_float(word); }
  static GMC_HD Word round(float x) {
    const uint32_t key = magnitude_key(x), sign = (float_bits(x) >> 16) & 0x8000u;
    const uint32_t rounded = (key + 0x7fffu + ((key >> 16) & 1u)) >> 16;
    return static_cast<Word>(key > kInfKey ? 0x7fc0u : (sign | rounded));
  }
};

struct Float16 {
  using Word = uint16_t;
  static GMC_HD float to_float(Word word) { return fp16_to_float(word); }
  static GMC_HD Word round(float x) {
    const uint32_t key = magnitude_key(x), sign = (float_bits(x) >> 16) & 0x8000u;
    const uint32_t special = key > kInfKey ? 0x7e00u : 0x7c00u;
    const uint32_t overflow = 0x477ff000u;  // 65520, half-way from 65504 to the next step
    return key >= overflow ? static_cast<Word>(sign | special) : float_to_fp16(x);
  }
};

// Calls function(format), the format being one of the structs above.
GMC_ANY_SIDE
template <class Function>
GMC_HD auto with_dtype(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kBFloat16:
      return function(BFloat16{});
    case DType::kFloat16:
      return function(Float16{});
    default:
      return function(Float32{});
  }
}

GMC_HD int64_t element_size(DType dtype) {
  return with_dtype(dtype, [](auto format) {
    return static_cast<int64_t>(sizeof(typename decltype(format)::Word));
  });
}

template <class Format>
GMC_HD float load_as(const void* values, int64_t i) {
  return Format::to_float(static_cast<const typename Format::Word*>(values)[i]);
}

template <class Format>
GMC_HD void store_as(void* values, int64_t i, float x) {
  static_cast<typename Format::Word*>(values)[i] = Format::round(x);
}

GMC_HD float load_value(const void* values, DType dtype, int64_t i) {
  return with_dtype(dtype, [=](auto format) { return load_as<decltype(format)>(values, i); });
}

GMC_HD void store_value(void* values, DType dtype, int64_t i, float x) {
  with_dtype(dtype, [=](auto format) { store_as<decltype(format)>(values, i, x); });
}

// ---------------------------------------------------------------------------------------------
// Values on the wire: codes of 32, 16, 8 or 4 bits. Those of 8 and 4 bits count from 2**scale, one
// scale for all values of a payload (scale.h); for the others it is 0. Codes saturate at the
// largest finite value; a reader takes finite ones only. A type's number is part of every header.
// ---------------------------------------------------------------------------------------------

enum class WireType : uint32_t {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kFloat8 = 3,  // e4m3fn
  kFloat4 = 4,  // e2m1fn, two to a byte, the first in the low half
};

struct WireFloat32 {
  static constexpr int kBits = 32;
  static constexpr bool kScaled = false;
  static GMC_HD float decode(uint32_t code, int) { return bits_float(code); }
  static GMC_HD uint32_t encode(float x, int) { return float_bits(x); }
  static GMC_HD bool sound(uint32_t code) { return (code & kKeyMask) < kInfKey; }
};

struct WireBFloat16 {
  static constexpr int kBits = 16;
  static constexpr bool kScaled = false;
  static GMC_HD float decode(uint32_t code, int) {
    return bf16_to_float(static_cast<uint16_t>(code));
  }
  static GMC_HD uint32_t encode(float x, int) { return float_to_bf16(x); }
  static GMC_HD bool sound(uint32_t code) { return (code & 0x7fffu) < 0x7f80u; }
};

struct WireFloat16 {
  static constexpr int kBits = 16;
  static constexpr bool kScaled = false;
  static GMC_HD float decode(uint32_t code, int) {
    return fp16_to_float(static_cast<uint16_t>(code));
  }
  static GMC_HD uint32_t encode(float x, int) { return float_to_fp16(x); }
  static GMC_HD bool sound(uint32_t code) { return (code & 0x7fffu) < 0x7c00u; }
};

// A format of a sign, an exponent and `mantissa` bits. Every value is a whole number of steps of
// 2**(scale + step); `top` is the exponent of the largest, `largest` its code. The scale is bounded
// so that steps and values are normal numbers of float32.
template <int bits, int mantissa, int step, int top, uint32_t largest>
struct WireSmall {
  static constexpr int kBits = bits;
  static constexpr bool kScaled = true;
  static constexpr int kTop = top;
  static constexpr int kSmallestScale = -126 - step, kLargestScale = 127 - top;

  static GMC_HD float decode(uint32_t code, int scale) {
    const uint32_t magnitude = code & kMagnitude;
    const float few = static_cast<float>(static_cast<int32_t>(magnitude)) * power_of_2(step);
    const float many = bits_float((magnitude << kDropped) + kOffset);
    const float x = (magnitude < kFirstNormal ? few : many) * power_of_2(scale);
    return bits_float(float_bits(x) | (code & kSign ? ~kKeyMask : 0));
  }

  static GMC_HD uint32_t encode(float x, int scale) {
    const uint32_t key = magnitude_key(x * power_of_2(-scale));
    const uint32_t within = key < kLargestKey ? key : kLargestKey;
    // Below the code's normal values the spacing is one step, which is float32's at 2**(step + 23).
    const float spaced = power_of_2(step + 23);
    const uint32_t few = float_bits(bits_float(within) + spaced) - float_bits(spaced);
    const uint32_t odd = within >> kDropped & 1u;
    const uint32_t many = (within - kOffset + (1u << (kDropped - 1)) - 1 + odd) >> kDropped;
    const uint32_t magnitude = within < (kFirstNormal << kDropped) + kOffset ? few : many;
    return magnitude | (float_bits(x) & ~kKeyMask ? kSign : 0);
  }

  static GMC_HD bool sound(uint32_t code) { return (code & kMagnitude) <= largest; }

 private:
  static constexpr uint32_t kSign = 1u << (bits - 1), kMagnitude = kSign - 1;
  static constexpr int kDropped = 23 - mantissa;  // bits of float32's fraction
  static constexpr uint32_t kFirstNormal = 1u << mantissa;
  // The difference between float32's bits and a code's, shifted to their place in float32: 2**(step
  // + mantissa) has an exponent field of 1 in a code.
  static constexpr uint32_t kOffset = static_cast<uint32_t>(step + mantissa - 1 + 127) << 23;
  static constexpr uint32_t kLargestKey = (largest << kDropped) + kOffset;

  static GMC_HD float power_of_2(int exponent) {
    return bits_float(static_cast<uint32_t>(exponent + 127) << 23);
  }
};

using WireFloat8 = WireSmall<8, 3, -9, 8, 0x7e>;
using WireFloat4 = WireSmall<4, 1, -1, 2, 0x7>;

constexpr uint32_t kWireTypes = 5;  // numbers below this one are known

// Calls function(format), the format being one of the structs above.
GMC_ANY_SIDE
template <class Function>
GMC_HD auto with_wire_type(WireType wire, const Function& function) {
  switch (wire) {
    case WireType::kBFloat16:
      return function(WireBFloat16{});
    case WireType::kFloat16:
      return function(WireFloat16{});
    case WireType::kFloat8:
      return function(WireFloat8{});
    case WireType::kFloat4:
      return function(WireFloat4{});
    default:
      return function(WireFloat32{});
  }
}

// Bytes of k values.
GMC_HD int64_t wire_nbytes(WireType wire, int64_t k) {
  return with_wire_type(wire, [=](auto format) { return (k * decltype(format)::kBits + 7) / 8; });
}

// The i-th code of an array.
template <class Format>
GMC_HD uint32_t load_code(const void* codes, int64_t i) {
  if constexpr (Format::kBits == 32) {
    return static_cast<const uint32_t*>(codes)[i];
  } else if constexpr (Format::kBits == 16) {
    return static_cast<const uint16_t*>(codes)[i];
  } else if constexpr (Format::kBits == 8) {
    return static_cast<const uint8_t*>(codes)[i];
  } else {
    return static_cast<const uint8_t*>(codes)[i >> 1] >> (4 * (i & 1)) & 0xfu;
  }
}

// Stores the i-th code of an array, for codes of whole bytes. Each backend writes halves of a byte
// itself, because two threads may share one.
template <class Format>
GMC_HD void store_code(void* codes, int64_t i, uint32_t code) {
  static_assert(Format::kBits >= 8, "a code of its own bytes");
  if constexpr (Format::kBits == 32) {
    static_cast<uint32_t*>(codes)[i] = code;
  } else if constexpr (Format::kBits == 16) {
    static_cast<uint16_t*>(codes)[i] = static_cast<uint16_t>(code);
  } else {
    static_cast<uint8_t*>(codes)[i] = static_cast<uint8_t>(code);
  }
}

}  // namespace gmc
