// A list of tensors as the segments of a bucket: tensors, or the places where they lie.
#pragma once

#include <vector>

#include "checks.h"
#include "shared/bucket.h"
#include "tensor.h"

namespace gmc {

inline const Tensor* get(const Tensor& tensor) { return &tensor; }
inline const Tensor* get(const OptionalTensor& tensor) { return tensor ? &*tensor : nullptr; }

// A list of hundreds of tensors takes half a microsecond each to hand over. So the optimizer may
// write down where they lie, and hand over two tensors of int64 on the CPU in the list's place: the
// addresses, and kPlaces followed by each one's numel and dtype. It vouches for them: on the right
// device, contiguous, and alive.
constexpr int64_t kPlaces = 0x7365'6361'6c70'6367;  // "gcplaces", which no list begins with

template <class List>
bool has_places(const List& tensors) {
  if (tensors.size() != 2) return false;
  const Tensor *addresses = get(tensors[0]), *kinds = get(tensors[1]);
  for (const Tensor* tensor : {addresses, kinds})
    if (!tensor || !tensor->is_cpu() || tensor->scalar_type() != ScalarType::Long ||
        tensor->dim() != 1 || !tensor->is_contiguous())
      return false;
  return kinds->numel() == 1 + 2 * addresses->numel() && data<int64_t>(*kinds)[0] == kPlaces;
}

inline std::vector<Segment> placed_segments(const Tensor& addresses, const Tensor& kinds) {
  std::vector<Segment> result;
  const int64_t count = addresses.numel(), *address = data<int64_t>(addresses);
  const int64_t* kind = data<int64_t>(kinds) + 1;
  result.reserve(count);
  for (int64_t i = 0, begin = 0; i < count; begin += kind[2 * i], ++i)
    result.push_back({reinterpret_cast<void*>(address[i]), begin, kind[2 * i],
                      static_cast<DType>(kind[2 * i + 1])});
  return result;
}

// Checks a bucket's tensors and lays them out one after the other. Entries without a value take
// their size from `sizes`.
template <class List>
std::vector<Segment> check_segments(const List& tensors, const char* list, Device device,
                                    const std::vector<int64_t>* sizes) {
  if (has_places(tensors)) return placed_segments(*get(tensors[0]), *get(tensors[1]));
  std::vector<Segment> result;
  result.reserve(tensors.size());
  int64_t begin = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor* tensor = get(tensors[i]);
    const Name name(list, i);
    int64_t numel = 0;
    if (tensor) {
      check_tensor(*tensor, name, device);
      numel = tensor->numel();
      result.push_back(
          {tensor->data_ptr(), begin, numel, check_float_dtype(tensor->scalar_type(), name)});
    } else {
      GMC_CHECK_VALUE(sizes, name, ": got None, must be a tensor when params is None");
      numel = (*sizes)[i];
      result.push_back({nullptr, begin, numel, DType::kFloat32});
    }
    GMC_CHECK_VALUE(!sizes || numel == (*sizes)[i], name, ": got ", numel, " elements, must be ",
                    (*sizes)[i], " like params[", i, "]");
    begin += numel;
  }
  return result;
}

inline int64_t total_numel(const std::vector<Segment>& segments) {
  return segments.empty() ? 0 : segments.back().begin + segments.back().numel;
}

}  // namespace gmc
