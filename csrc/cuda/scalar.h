// A number that the host knows, or one in device memory that is read when the kernel runs.
#pragma once

#include "numbers.h"

namespace gmc::cuda {

enum class ScalarType : uint32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

struct Scalar {
  const void* data;  // nullptr: `value` holds it
  ScalarType type;
  float value;

  GMC_HD float load() const {
    if (!data) return value;
    if (type == ScalarType::kFloat64) return static_cast<float>(*static_cast<const double*>(data));
    return load_value(data, static_cast<DType>(type), 0);
  }
};

inline Scalar scalar(float value) { return {nullptr, ScalarType::kFloat32, value}; }

}  // namespace gmc::cuda
