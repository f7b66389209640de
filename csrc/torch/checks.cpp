#include "checks.h"

#include <algorithm>

namespace gmc {
namespace {

std::string bracketed(const int64_t* numbers, size_t count) {
  std::string text = "[";
  for (size_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(numbers[i]);
  return text + "]";
}

std::string strides_of(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return bracketed(strides.data(), strides.size());
}

bool is_floating(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
    case ScalarType::Double:
    case ScalarType::Half:
    case ScalarType::BFloat16:
    case ScalarType::Float8_e5m2:
    case ScalarType::Float8_e4m3fn:
    case ScalarType::Float8_e5m2fnuz:
    case ScalarType::Float8_e4m3fnuz:
    case ScalarType::Float8_e8m0fnu:
    case ScalarType::Float4_e2m1fn_x2:
      return true;
    default:
      return false;
  }
}

Scalar::Type scalar_type(ScalarType dtype, Name name) {
  switch (dtype) {
    case ScalarType::Float:
      return Scalar::kFloat32;
    case ScalarType::BFloat16:
      return Scalar::kBFloat16;
    case ScalarType::Half:
      return Scalar::kFloat16;
    case ScalarType::Double:
      return Scalar::kFloat64;
    default:
      raise("TypeError", name, ": got ", dtype_name(dtype),
            ", must be torch.float32, bfloat16, float16 or float64");
  }
}

void check_alignment(const Tensor& tensor, const void* data, Name name) {
  GMC_CHECK_VALUE(tensor.is_cpu() || reinterpret_cast<uintptr_t>(data) % 16 == 0, name,
                  ": got a view that begins at byte ", tensor.storage_offset(),
                  " of its storage, must begin at a multiple of 16");
}

}  // namespace

std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.name;
  return name.item < 0 ? out : out << "[" << name.item << "]";
}

std::ostream& operator<<(std::ostream& out, const Device& device) {
  if (device.type == aoti_torch_device_type_cpu()) {
    out << "cpu";
  } else if (device.type == aoti_torch_device_type_cuda()) {
    out << "cuda";
  } else if (device.type == aoti_torch_device_type_meta()) {
    out << "meta";
  } else {
    out << "of type " << device.type;
  }
  return device.index < 0 ? out : out << ":" << device.index;
}

// torch's C++ calls a dtype "Float"; users know it as torch.float32.
std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    default:
      return std::string("torch.") + torch::headeronly::toString(dtype);
  }
}

std::string sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return bracketed(sizes.data(), sizes.size());
}

DType check_float_dtype(ScalarType dtype, Name name) {
  if (dtype == ScalarType::Float) return DType::kFloat32;
  if (dtype == ScalarType::BFloat16) return DType::kBFloat16;
  if (dtype == ScalarType::Half) return DType::kFloat16;
  raise("TypeError", name, ": got ", dtype_name(dtype),
        ", must be torch.float32, torch.bfloat16 or torch.float16");
}

WireType check_wire_type(ScalarType dtype) {
  if (dtype == ScalarType::Float) return WireType::kFloat32;
  if (dtype == ScalarType::BFloat16) return WireType::kBFloat16;
  if (dtype == ScalarType::Half) return WireType::kFloat16;
  if (dtype == ScalarType::Float8_e4m3fn) return WireType::kFloat8;
  if (dtype == ScalarType::Float4_e2m1fn_x2) return WireType::kFloat4;
  raise("TypeError", "wire_dtype: got ", dtype_name(dtype),
        ", must be torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn or "
        "torch.float4_e2m1fn_x2");
}

void check_numel(int64_t numel, Name name) {
  GMC_CHECK_VALUE(numel >= 1 && numel <= kMaxNumel, name, ": got ", numel,
                  " elements, must be between 1 and 2**31 - 1");
}

void check_k(int64_t k, int64_t numel) {
  GMC_CHECK_VALUE(k >= 1 && k <= numel, "k: got ", k, ", must be between 1 and numel = ", numel);
}

PayloadShape check_shape(int64_t numel, int64_t k, ScalarType wire_dtype) {
  check_numel(numel, "numel");
  check_k(k, numel);
  return {numel, k, check_wire_type(wire_dtype)};
}

Ranges check_cut(int64_t numel, int64_t k, ScalarType wire_dtype, int64_t width, int64_t last_k) {
  GMC_CHECK_VALUE(width >= 1 && width <= numel, "width: got ", width,
                  ", must be between 1 and numel = ", numel);
  const int64_t count = (numel + width - 1) / width;
  GMC_CHECK_VALUE(count <= kMaxRanges, "width: got ", width, " for ", numel,
                  " elements, which are ", count, " ranges, must make at most ", kMaxRanges);
  const PayloadShape full = check_shape(width, k, wire_dtype);
  const PayloadShape last = {numel - (count - 1) * width, last_k, full.wire};
  GMC_CHECK_VALUE(last_k >= 1 && last_k <= std::min(k, last.numel), "last_k: got ", last_k,
                  ", must be between 1 and ", std::min(k, last.numel));
  return {full, last, count};
}

Ranges check_ranges(int64_t numel, int64_t k, ScalarType wire_dtype, int64_t width,
                    int64_t last_k) {
  if (width == 0) return uncut(check_shape(numel, k, wire_dtype));
  return check_cut(numel, k, wire_dtype, width, last_k);
}

void check_tensor(const Tensor& tensor, Name name, Device device, std::optional<ScalarType> dtype) {
  int32_t layout = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor.get(), &layout));
  GMC_CHECK_TYPE(layout == aoti_torch_layout_strided(), name,
                 ": got another layout, must be a dense tensor (torch.strided)");
  const Device own(tensor);
  GMC_CHECK_VALUE(own == device, name, ": got device ", own, ", must be ", device,
                  ", like the other tensors");
  if (dtype) {
    const ScalarType got = tensor.scalar_type();
    GMC_CHECK_TYPE(got == *dtype, name, ": got ", dtype_name(got), ", must be ",
                   dtype_name(*dtype));
  }
  GMC_CHECK_VALUE(tensor.is_contiguous(), name, ": got a non-contiguous tensor of shape ",
                  sizes_of(tensor), " and strides ", strides_of(tensor), ", must be contiguous");
}

void check_vector(const Tensor& tensor, Name name, Device device, ScalarType dtype, int64_t numel) {
  check_tensor(tensor, name, device, dtype);
  GMC_CHECK_VALUE(tensor.dim() == 1 && tensor.numel() == numel, name, ": got shape ",
                  sizes_of(tensor), ", must be [", numel, "]");
}

Scalar check_number(const Tensor& tensor, Name name, Device device) {
  GMC_CHECK_VALUE(tensor.numel() == 1, name, ": got shape ", sizes_of(tensor),
                  ", must hold one number");
  GMC_CHECK_TYPE(is_floating(tensor.scalar_type()), name, ": got ",
                 dtype_name(tensor.scalar_type()), ", must be a floating-point number");
  const Device own(tensor);
  GMC_CHECK_VALUE(own == device || own.is_cpu(), name, ": got device ", own, ", must be cpu or ",
                  device);
  if (own.is_cpu()) return scalar(number(tensor));
  return {tensor.const_data_ptr(), scalar_type(tensor.scalar_type(), name), 0.0f};
}

const uint8_t* readable_bytes(const Tensor& tensor, Name name) {
  const auto* bytes = data<uint8_t>(tensor);
  check_alignment(tensor, bytes, name);
  return bytes;
}

uint8_t* writable_bytes(const Tensor& tensor, Name name) {
  auto* bytes = mutable_data<uint8_t>(tensor);
  check_alignment(tensor, bytes, name);
  return bytes;
}

Payload check_payload(const Tensor& payload, Device device, int64_t numel, int64_t k,
                      ScalarType wire_dtype) {
  const PayloadShape shape = check_shape(numel, k, wire_dtype);
  check_vector(payload, "payload", device, ScalarType::Byte, PayloadLayout(shape).nbytes);
  return {readable_bytes(payload, "payload"), shape};
}

Aggregate check_aggregate(const Tensor& aggregate, Device device, int64_t numel) {
  check_tensor(aggregate, "aggregate", device, ScalarType::Byte);
  GMC_CHECK_VALUE(aggregate.dim() == 1 && aggregate.numel() >= AggregateLayout(numel, 1).nbytes,
                  "aggregate: got shape ", sizes_of(aggregate),
                  ", must come from merge or sparsify for ", numel, " elements");
  const uint8_t* const bytes = readable_bytes(aggregate, "aggregate");
  const Aggregate result{bytes, aggregate.numel()};
  if (!device.is_cpu()) return result;  // the header is checked by the kernels
  const AggregateHeader& header = *at<AggregateHeader>(bytes, 0);
  GMC_CHECK_VALUE(header.tag == kAggregateMagic,
                  "aggregate: got bytes that are no aggregate, must come from merge or sparsify");
  GMC_CHECK_VALUE(header.numel == numel, "aggregate: got one for ", header.numel,
                  " elements, must be for ", numel);
  const AggregateLayout layout(numel, header.capacity);
  const AggregateView view(bytes, layout);
  bool sound = layout.nbytes == aggregate.numel();
  for (int64_t tile = 0; sound && tile < tile_count(numel); ++tile) {
    const int64_t start = view.starts[tile], count = view.counts[tile];
    sound = start + count <= header.capacity;
    if (!sound || count == 0) continue;
    const uint16_t* indices = view.indices + start;
    for (int64_t i = 1; i < count; ++i) sound &= indices[i] > indices[i - 1];
    sound &= tile * kTile + indices[count - 1] < numel;
  }
  GMC_CHECK_VALUE(sound, "aggregate: got damaged bytes, must come from merge or sparsify");
  return result;
}

}  // namespace gmc
