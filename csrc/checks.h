// Argument checks that name the argument, what it was and what it must be.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string>

#include "payload.h"

namespace gmc {

// Raises TypeError unless the dtype is one of float32, bfloat16 and float16.
DType check_float_dtype(at::ScalarType dtype, const std::string& name);
void check_numel(int64_t numel, const std::string& name);
void check_k(int64_t k, int64_t numel);

// A dense, contiguous tensor on the given device. dtype: checked when given.
void check_tensor(const at::Tensor& tensor, const std::string& name, at::Device device,
                  std::optional<at::ScalarType> dtype = std::nullopt);
// The same, one-dimensional and of the given length.
void check_vector(const at::Tensor& tensor, const std::string& name, at::Device device,
                  at::ScalarType dtype, int64_t numel);
// One floating-point number, on the CPU or on the given device.
void check_number(const at::Tensor& tensor, const std::string& name, at::Device device);
void check_skip(const std::optional<at::Tensor>& skip, at::Device device);
void check_payload(const at::Tensor& payload, at::Device device, int64_t numel, int64_t k,
                   DType wire);
// Opaque bytes that merge or sparsify made for numel elements.
void check_aggregate(const at::Tensor& aggregate, at::Device device, int64_t numel);

}  // namespace gmc
