// Argument checks that name the argument, what it was and what it must be.
#pragma once

#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>

#include "shared/bucket.h"
#include "tensor.h"

namespace gmc {

// Through the stable interface every exception arrives as a RuntimeError. Its text begins with the
// kind that it should be, and gmc_cuda/ops.py makes it that kind.
template <class... Arguments>
[[noreturn]] void raise(const char* kind, const Arguments&... arguments) {
  std::ostringstream text;
  text << kind << ": ";
  (text << ... << arguments);
  throw std::runtime_error(text.str());
}

#define GMC_CHECK_VALUE(condition, ...) \
  if (!(condition)) ::gmc::raise("ValueError", __VA_ARGS__)
#define GMC_CHECK_TYPE(condition, ...) \
  if (!(condition)) ::gmc::raise("TypeError", __VA_ARGS__)

// An argument's name, or that of an item of a list; text only in an error.
struct Name {
  const char* name;
  int64_t item = -1;

  Name(const char* name) : name(name) {}  // NOLINT: a name is written as a string
  Name(const char* list, size_t item) : name(list), item(static_cast<int64_t>(item)) {}
};
std::ostream& operator<<(std::ostream& out, const Name& name);
std::ostream& operator<<(std::ostream& out, const Device& device);  // "cuda:0"

std::string dtype_name(ScalarType dtype);  // "torch.float32"
// "[3, 4]"
std::string sizes_of(const Tensor& tensor);

// Raises TypeError unless the dtype is one of float32, bfloat16 and float16.
DType check_float_dtype(ScalarType dtype, Name name);
WireType check_wire_type(ScalarType dtype);
void check_numel(int64_t numel, Name name);
void check_k(int64_t k, int64_t numel);
PayloadShape check_shape(int64_t numel, int64_t k, ScalarType wire_dtype);
Ranges check_cut(int64_t numel, int64_t k, ScalarType wire_dtype, int64_t width, int64_t last_k);
// As check_cut, or with width == 0 those of a bucket that is not cut.
Ranges check_ranges(int64_t numel, int64_t k, ScalarType wire_dtype, int64_t width, int64_t last_k);

// A dense, contiguous tensor on the given device. dtype: checked when given.
void check_tensor(const Tensor& tensor, Name name, Device device,
                  std::optional<ScalarType> dtype = std::nullopt);
// A tensor as check_tensor asks for, one-dimensional and of the given length.
void check_vector(const Tensor& tensor, Name name, Device device, ScalarType dtype, int64_t numel);
// One floating-point number, on the CPU or on the given device.
Scalar check_number(const Tensor& tensor, Name name, Device device);
// Opaque bytes. On a GPU they are read 16 at a time at most, so a view must begin at a multiple of
// 16 bytes; fresh tensors are aligned to far more.
const uint8_t* readable_bytes(const Tensor& tensor, Name name);
uint8_t* writable_bytes(const Tensor& tensor, Name name);
Payload check_payload(const Tensor& payload, Device device, int64_t numel, int64_t k,
                      ScalarType wire_dtype);
// What merge or sparsify made for numel elements.
Aggregate check_aggregate(const Tensor& aggregate, Device device, int64_t numel);

}  // namespace gmc
