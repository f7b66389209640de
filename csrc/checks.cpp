#include "checks.h"

#include <sstream>

namespace gmc {
namespace {

// c10 prints dtypes as "Float"; users know them as torch.float32.
std::string dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "torch.float32";
    case at::kBFloat16:
      return "torch.bfloat16";
    case at::kHalf:
      return "torch.float16";
    case at::kDouble:
      return "torch.float64";
    case at::kByte:
      return "torch.uint8";
    case at::kInt:
      return "torch.int32";
    case at::kLong:
      return "torch.int64";
    default:
      return std::string("torch.") + c10::toString(dtype);
  }
}

std::string shape_of(const at::Tensor& tensor) {
  std::ostringstream out;
  out << "shape " << tensor.sizes();
  return out.str();
}

}  // namespace

DType check_float_dtype(at::ScalarType dtype, const std::string& name) {
  if (dtype == at::kFloat) return DType::kFloat32;
  if (dtype == at::kBFloat16) return DType::kBFloat16;
  if (dtype == at::kHalf) return DType::kFloat16;
  TORCH_CHECK_TYPE(false, name, ": got ", dtype_name(dtype),
                   ", must be torch.float32, torch.bfloat16 or torch.float16");
}

void check_numel(int64_t numel, const std::string& name) {
  TORCH_CHECK_VALUE(numel >= 1 && numel <= kMaxNumel, name, ": got ", numel,
                    " elements, must be between 1 and 2**31 - 1");
}

void check_k(int64_t k, int64_t numel) {
  TORCH_CHECK_VALUE(k >= 1 && k <= numel, "k: got ", k, ", must be between 1 and numel = ", numel);
}

void check_tensor(const at::Tensor& tensor, const std::string& name, at::Device device,
                  std::optional<at::ScalarType> dtype) {
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, name, ": got layout ", tensor.layout(),
                   ", must be a dense tensor (torch.strided)");
  TORCH_CHECK_VALUE(tensor.device() == device, name, ": got device ", tensor.device(), ", must be ",
                    device, ", like the other tensors");
  if (dtype) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == *dtype, name, ": got ",
                     dtype_name(tensor.scalar_type()), ", must be ", dtype_name(*dtype));
  }
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, ": got a non-contiguous tensor of ",
                    shape_of(tensor), " and strides ", tensor.strides(), ", must be contiguous");
}

void check_vector(const at::Tensor& tensor, const std::string& name, at::Device device,
                  at::ScalarType dtype, int64_t numel) {
  check_tensor(tensor, name, device, dtype);
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.numel() == numel, name, ": got ", shape_of(tensor),
                    ", must be [", numel, "]");
}

void check_number(const at::Tensor& tensor, const std::string& name, at::Device device) {
  TORCH_CHECK_VALUE(tensor.numel() == 1, name, ": got ", shape_of(tensor),
                    ", must hold one number");
  TORCH_CHECK_TYPE(at::isFloatingType(tensor.scalar_type()), name, ": got ",
                   dtype_name(tensor.scalar_type()), ", must be a floating-point number");
  TORCH_CHECK_VALUE(tensor.device() == device || tensor.device().is_cpu(), name, ": got device ",
                    tensor.device(), ", must be cpu or ", device);
}

void check_skip(const std::optional<at::Tensor>& skip, at::Device device) {
  if (skip) check_vector(*skip, "skip", device, at::kInt, 1);
}

void check_payload(const at::Tensor& payload, at::Device device, int64_t numel, int64_t k,
                   DType wire) {
  check_vector(payload, "payload", device, at::kByte, PayloadLayout(numel, k, wire).nbytes);
}

void check_aggregate(const at::Tensor& aggregate, at::Device device, int64_t numel) {
  check_tensor(aggregate, "aggregate", device, at::kByte);
  TORCH_CHECK_VALUE(aggregate.dim() == 1 && aggregate.numel() >= AggregateLayout(numel, 1).nbytes,
                    "aggregate: got ", shape_of(aggregate),
                    ", must come from merge or sparsify for ", numel, " elements");
  if (!device.is_cpu()) return;  // the header is checked by the kernels
  const auto* data = aggregate.const_data_ptr<uint8_t>();
  const auto* header = reinterpret_cast<const AggregateHeader*>(data);
  TORCH_CHECK_VALUE(header->tag == kAggregateMagic,
                    "aggregate: got bytes that are no aggregate, must come from merge or sparsify");
  TORCH_CHECK_VALUE(header->numel == numel, "aggregate: got one for ", header->numel,
                    " elements, must be for ", numel);
  const AggregateLayout layout(numel, header->capacity);
  bool sound = layout.nbytes == aggregate.numel();
  for (int64_t tile = 0; sound && tile < tile_count(numel); ++tile) {
    const int64_t start = reinterpret_cast<const uint32_t*>(data + layout.starts)[tile];
    const int64_t count = reinterpret_cast<const uint32_t*>(data + layout.counts)[tile];
    sound = start + count <= header->capacity;
    if (!sound || count == 0) continue;
    const auto* indices = reinterpret_cast<const uint16_t*>(data + layout.indices) + start;
    for (int64_t i = 1; i < count; ++i) sound &= indices[i] > indices[i - 1];
    sound &= tile * kTile + indices[count - 1] < numel;
  }
  TORCH_CHECK_VALUE(sound, "aggregate: got damaged bytes, must come from merge or sparsify");
}

}  // namespace gmc
