// Tensors of torch's stable C++ interface. Every file that sees a tensor includes this one. Only
// torch/csrc/stable, torch/headeronly and the C interface below them keep their binary form from
// one version of torch to the next; nothing else of torch may be included anywhere.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace gmc {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using TensorList = std::vector<Tensor>;
using TensorOrNoneList = std::vector<OptionalTensor>;

// A device in torch's own numbers, which the stable interface names only by functions.
struct Device {
  int32_t type, index;

  explicit Device(const Tensor& tensor) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &index));
  }

  bool is_cpu() const { return type == aoti_torch_device_type_cpu(); }
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

// An uninitialised contiguous tensor on the given device.
inline Tensor empty(std::vector<int64_t> sizes, ScalarType dtype, Device device) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device.type,
      device.index, &handle));
  return Tensor(handle);
}

// The number that a tensor with one element on the CPU holds.
inline float number(const Tensor& tensor) {
  double value = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_item_float64(tensor.get(), &value));
  return static_cast<float>(value);
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace gmc
