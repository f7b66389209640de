// The operators: all schemas, and for each the argument checks before any kernel runs.
#include <ATen/Functions.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"
#include "cuda/tensors.h"

namespace gmc {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

#ifdef GMC_WITH_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

// Which kernels an op takes. Guarded by `if constexpr (kWithCuda)`, calls of the CUDA kernels
// vanish from builds without them.
bool on_gpu(const Tensor& tensor, const char* op) {
  if (tensor.device().is_cpu()) return false;
  if (!kWithCuda)
    C10_THROW_ERROR(NotImplementedError,
                    std::string(op) +
                        ": this build of gmc_cuda has no CUDA kernels, so tensors must be on the "
                        "CPU (nothing is copied silently)");
  return true;
}

std::string item(const char* list, size_t i) {
  return std::string(list) + "[" + std::to_string(i) + "]";
}

// Checks a bucket's tensors and lays them out one behind the other. Entries without a value
// take their size from `sizes`.
std::vector<cpu::Segment> segments(const c10::List<OptionalTensor>& tensors, const char* name,
                                   at::Device device, const std::vector<int64_t>* sizes) {
  std::vector<cpu::Segment> result;
  int64_t begin = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const OptionalTensor tensor = tensors.get(i);
    int64_t numel = 0;
    if (tensor) {
      check_tensor(*tensor, item(name, i), device);
      numel = tensor->numel();
      result.push_back({tensor->data_ptr(), begin, numel,
                        check_float_dtype(tensor->scalar_type(), item(name, i))});
    } else {
      TORCH_CHECK_VALUE(sizes, item(name, i), ": got None, must be a tensor when params is None");
      numel = (*sizes)[i];
      result.push_back({nullptr, begin, numel, DType::kFloat32});
    }
    TORCH_CHECK_VALUE(!sizes || numel == (*sizes)[i], item(name, i), ": got ", numel,
                      " elements, must be ", sizes ? (*sizes)[i] : 0, " like params[", i, "]");
    begin += numel;
  }
  return result;
}

c10::List<OptionalTensor> as_optional(at::TensorList tensors) {
  c10::List<OptionalTensor> list;
  for (const Tensor& tensor : tensors) list.push_back(tensor);
  return list;
}

int64_t total(const std::vector<cpu::Segment>& segments) {
  return segments.empty() ? 0 : segments.back().begin + segments.back().numel;
}

float number(const Tensor& tensor) { return static_cast<float>(tensor.item<double>()); }

bool skipped(const OptionalTensor& skip) { return skip && *skip->const_data_ptr<int32_t>() != 0; }

int64_t payload_nbytes(int64_t numel, int64_t k, at::ScalarType wire_dtype) {
  check_numel(numel, "numel");
  check_k(k, numel);
  return PayloadLayout(numel, k, check_float_dtype(wire_dtype, "wire_dtype")).nbytes;
}

int64_t aggregate_nbytes(int64_t numel, int64_t k, int64_t ranks) {
  return AggregateLayout(numel, aggregate_capacity(numel, k, ranks)).nbytes;
}

int64_t state_nbytes(int64_t numel, int64_t k, at::Device device) {
  check_numel(numel, "numel");
  check_k(k, numel);
  if constexpr (kWithCuda) {
    if (device.is_cuda()) return cuda::state_nbytes(numel, k);
  }
  return cpu::kStateBytes;
}

Tensor compress(const Tensor& memory, const c10::List<OptionalTensor>& grads, int64_t k,
                const Tensor& momentum, const OptionalTensor& aggregate,
                const OptionalTensor& momentum_buffer, bool nesterov, double weight_decay,
                const std::optional<std::vector<Tensor>>& params, bool maximize,
                const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                at::ScalarType wire_dtype, const OptionalTensor& state) {
  const at::Device device = memory.device();
  const int64_t numel = memory.numel();
  check_numel(numel, "memory");
  check_vector(memory, "memory", device, at::kFloat, numel);
  check_k(k, numel);
  const DType wire = check_float_dtype(wire_dtype, "wire_dtype");
  check_number(momentum, "momentum", device);
  TORCH_CHECK_VALUE(!(aggregate && momentum_buffer),
                    "aggregate: got a tensor beside momentum_buffer, must be None with local "
                    "momentum");
  TORCH_CHECK_VALUE(!nesterov || momentum_buffer,
                    "nesterov: got True without momentum_buffer, must be False");
  if (aggregate) check_aggregate(*aggregate, device, numel);
  if (momentum_buffer) check_vector(*momentum_buffer, "momentum_buffer", device, at::kFloat, numel);
  TORCH_CHECK_VALUE(weight_decay == 0 || params,
                    "params: got None with weight_decay = ", weight_decay,
                    ", must be the parameters to decay");

  std::vector<cpu::Segment> param_segments;
  std::vector<int64_t> sizes;
  if (params) {
    param_segments = segments(as_optional(*params), "params", device, nullptr);
    for (const auto& segment : param_segments) sizes.push_back(segment.numel);
    TORCH_CHECK_VALUE(grads.size() == params->size(), "grads: got ", grads.size(),
                      " tensors, must be ", params->size(), " like params");
  }
  std::vector<cpu::Segment> grad_segments =
      segments(grads, "grads", device, params ? &sizes : nullptr);
  TORCH_CHECK_VALUE(total(grad_segments) == numel, "grads: got ", total(grad_segments),
                    " elements in all, must be ", numel, " like memory");
  if (grad_scale) check_number(*grad_scale, "grad_scale", device);
  if (found_inf) check_number(*found_inf, "found_inf", device);
  if (state) check_vector(*state, "state", device, at::kByte, state_nbytes(numel, k, device));
  const bool gpu = on_gpu(memory, "compress_");

  Tensor payload =
      at::empty({PayloadLayout(numel, k, wire).nbytes}, memory.options().dtype(at::kByte));
  if (weight_decay == 0) param_segments.clear();
  if (gpu) {
    if constexpr (kWithCuda)
      cuda::compress({memory, momentum_buffer, std::move(grad_segments), std::move(param_segments),
                      k, momentum, grad_scale, found_inf, static_cast<float>(weight_decay),
                      maximize, nesterov, aggregate, wire, payload, state});
    return payload;
  }
  const float factor = grad_scale ? 1.0f / number(*grad_scale) : 1.0f;
  cpu::compress({
      .memory = memory.mutable_data_ptr<float>(),
      .momentum_buffer = momentum_buffer ? momentum_buffer->mutable_data_ptr<float>() : nullptr,
      .grads = std::move(grad_segments),
      .params = std::move(param_segments),
      .numel = numel,
      .k = k,
      .momentum = number(momentum),
      .weight_decay = static_cast<float>(weight_decay),
      .grad_factor = maximize ? -factor : factor,
      .nesterov = nesterov,
      .found_inf = found_inf && number(*found_inf) != 0,
      .aggregate = aggregate ? aggregate->const_data_ptr<uint8_t>() : nullptr,
      .wire = wire,
      .payload = payload.mutable_data_ptr<uint8_t>(),
      .state = state ? state->mutable_data_ptr<uint8_t>() : nullptr,
  });
  return payload;
}

int64_t repairs(const Tensor& state) {
  if (on_gpu(state, "repairs")) {
    check_tensor(state, "state", state.device(), at::kByte);
    TORCH_CHECK_VALUE(state.dim() == 1 && state.numel() > cpu::kStateBytes, "state: got shape ",
                      state.sizes(), ", must come from select_state");
    if constexpr (kWithCuda) return cuda::repairs(state);
  }
  check_vector(state, "state", state.device(), at::kByte, cpu::kStateBytes);
  return cpu::state_repairs(state.const_data_ptr<uint8_t>());
}

// Checks the arguments that all readers of one payload share.
cuda::PayloadTensor payload_tensor(const Tensor& payload, at::Device device, int64_t numel,
                                   int64_t k, at::ScalarType wire_dtype) {
  check_numel(numel, "numel");
  check_k(k, numel);
  const DType wire = check_float_dtype(wire_dtype, "wire_dtype");
  check_payload(payload, device, numel, k, wire);
  return {payload, numel, k, wire};
}

cpu::PayloadArgs payload_args(const cuda::PayloadTensor& payload) {
  return {payload.bytes.const_data_ptr<uint8_t>(), payload.numel, payload.k, payload.wire};
}

std::tuple<Tensor, Tensor, Tensor> unpack(const Tensor& payload, int64_t numel, int64_t k,
                                          at::ScalarType wire_dtype) {
  const auto args = payload_tensor(payload, payload.device(), numel, k, wire_dtype);
  const bool gpu = on_gpu(payload, "unpack");
  // A damaged payload raises on the CPU; on the GPU its damaged tiles keep these values.
  Tensor indices = at::full({k}, -1, payload.options().dtype(at::kLong));
  Tensor values = at::zeros({k}, payload.options().dtype(at::kFloat));
  Tensor nonfinite = at::empty({}, payload.options().dtype(at::kLong));
  if (gpu) {
    if constexpr (kWithCuda) cuda::unpack(args, indices, values, nonfinite);
  } else {
    cpu::unpack(payload_args(args), indices.mutable_data_ptr<int64_t>(),
                values.mutable_data_ptr<float>(), nonfinite.mutable_data_ptr<int64_t>());
  }
  return {indices, values, nonfinite};
}

Tensor verdict(at::TensorList payloads) {
  TORCH_CHECK_VALUE(!payloads.empty(),
                    "payloads: got an empty list, must hold one tensor a bucket");
  const at::Device device = payloads[0].device();
  for (size_t i = 0; i < payloads.size(); ++i) {
    check_tensor(payloads[i], item("payloads", i), device, at::kByte);
    TORCH_CHECK_VALUE(payloads[i].dim() == 2 && payloads[i].size(0) >= 1 &&
                          payloads[i].size(1) >= static_cast<int64_t>(sizeof(PayloadHeader)),
                      item("payloads", i), ": got shape ", payloads[i].sizes(),
                      ", must be [world size, payload_nbytes]");
  }
  if (on_gpu(payloads[0], "verdict")) {
    Tensor verdict = at::empty({1}, payloads[0].options().dtype(at::kInt));
    if constexpr (kWithCuda) cuda::verdict(payloads, verdict);
    return verdict;
  }
  uint32_t flags = 0;
  for (const Tensor& payload : payloads)
    flags |= cpu::verdict(payload.const_data_ptr<uint8_t>(), payload.size(0), payload.size(1));
  return at::full({1}, static_cast<int64_t>(flags), payloads[0].options().dtype(at::kInt));
}

Tensor merge(const Tensor& payloads, int64_t numel, int64_t k, at::ScalarType wire_dtype,
             const OptionalTensor& skip) {
  check_numel(numel, "numel");
  check_k(k, numel);
  const DType wire = check_float_dtype(wire_dtype, "wire_dtype");
  const at::Device device = payloads.device();
  check_tensor(payloads, "payloads", device, at::kByte);
  const int64_t nbytes = PayloadLayout(numel, k, wire).nbytes;
  TORCH_CHECK_VALUE(payloads.dim() == 2 && payloads.size(0) >= 1 && payloads.size(1) == nbytes,
                    "payloads: got shape ", payloads.sizes(), ", must be [world size, ", nbytes,
                    "]");
  check_skip(skip, device);
  const bool gpu = on_gpu(payloads, "merge");
  const int64_t ranks = payloads.size(0);
  Tensor aggregate = at::empty({aggregate_nbytes(numel, k, ranks)}, payloads.options());
  const cuda::PayloadTensor args{payloads, numel, k, wire};
  if (gpu) {
    if constexpr (kWithCuda) cuda::merge(args, ranks, skip, aggregate);
  } else {
    cpu::merge(payload_args(args), ranks, skipped(skip), aggregate.mutable_data_ptr<uint8_t>());
  }
  return aggregate;
}

void apply(at::TensorList params, const Tensor& aggregate, const Tensor& lr,
           const OptionalTensor& skip) {
  const at::Device device = aggregate.device();
  const auto param_segments = segments(as_optional(params), "params", device, nullptr);
  const int64_t numel = total(param_segments);
  check_numel(numel, "params");
  check_aggregate(aggregate, device, numel);
  check_number(lr, "lr", device);
  check_skip(skip, device);
  if (on_gpu(aggregate, "apply_")) {
    if constexpr (kWithCuda) cuda::apply(param_segments, aggregate, numel, lr, skip);
  } else {
    if (skipped(skip)) return;
    cpu::apply(param_segments, aggregate.const_data_ptr<uint8_t>(), numel, number(lr));
  }
  for (const Tensor& param : params) param.unsafeGetTensorImpl()->bump_version();
}

void restore(const Tensor& memory, const Tensor& payload, int64_t k, at::ScalarType wire_dtype,
             const OptionalTensor& skip) {
  check_vector(memory, "memory", memory.device(), at::kFloat, memory.numel());
  const auto args = payload_tensor(payload, memory.device(), memory.numel(), k, wire_dtype);
  check_skip(skip, memory.device());
  if (on_gpu(memory, "restore_")) {
    if constexpr (kWithCuda) cuda::restore(memory, args, skip);
  } else if (!skip || skipped(skip)) {
    cpu::restore(memory.mutable_data_ptr<float>(), payload_args(args));
  }
}

void mask(const Tensor& momentum_buffer, const Tensor& payload, int64_t k,
          at::ScalarType wire_dtype, const OptionalTensor& skip) {
  const at::Device device = momentum_buffer.device();
  const int64_t numel = momentum_buffer.numel();
  check_vector(momentum_buffer, "momentum_buffer", device, at::kFloat, numel);
  const auto args = payload_tensor(payload, device, numel, k, wire_dtype);
  check_skip(skip, device);
  if (on_gpu(momentum_buffer, "mask_")) {
    if constexpr (kWithCuda) cuda::mask(momentum_buffer, args, skip);
  } else if (!skipped(skip)) {
    cpu::mask(momentum_buffer.mutable_data_ptr<float>(), payload_args(args));
  }
}

Tensor sparsify(const Tensor& dense) {
  check_numel(dense.numel(), "dense");
  check_vector(dense, "dense", dense.device(), at::kFloat, dense.numel());
  const bool gpu = on_gpu(dense, "sparsify");
  const int64_t numel = dense.numel();
  Tensor aggregate =
      at::empty({AggregateLayout(numel, numel).nbytes}, dense.options().dtype(at::kByte));
  if (gpu) {
    if constexpr (kWithCuda) cuda::sparsify(dense, aggregate);
  } else {
    cpu::sparsify(dense.const_data_ptr<float>(), numel, aggregate.mutable_data_ptr<uint8_t>());
  }
  return aggregate;
}

Tensor densify(const Tensor& aggregate, int64_t numel) {
  check_numel(numel, "numel");
  check_aggregate(aggregate, aggregate.device(), numel);
  const bool gpu = on_gpu(aggregate, "densify");
  Tensor dense = at::empty({numel}, aggregate.options().dtype(at::kFloat));
  if (gpu) {
    if constexpr (kWithCuda) cuda::densify(aggregate, dense);
  } else {
    cpu::densify(aggregate.const_data_ptr<uint8_t>(), numel, dense.mutable_data_ptr<float>());
  }
  return dense;
}

}  // namespace

TORCH_LIBRARY(gmc_cuda, m) {
  m.def("payload_nbytes(int numel, int k, ScalarType wire_dtype) -> int", payload_nbytes);
  m.def("aggregate_nbytes(int numel, int k, int ranks) -> int", aggregate_nbytes);
  m.def("state_nbytes(int numel, int k, Device device) -> int", state_nbytes);
  m.def(
      "compress_(Tensor(a!) memory, Tensor?[] grads, int k, *, Tensor momentum, "
      "Tensor? aggregate=None, Tensor(b!)? momentum_buffer=None, bool nesterov=False, "
      "float weight_decay=0.0, Tensor[]? params=None, bool maximize=False, "
      "Tensor? grad_scale=None, Tensor? found_inf=None, ScalarType wire_dtype, "
      "Tensor(c!)? state=None) -> Tensor");
  m.def("repairs(Tensor state) -> int");
  m.def(
      "unpack(Tensor payload, int numel, int k, ScalarType wire_dtype) -> "
      "(Tensor indices, Tensor values, Tensor nonfinite)");
  m.def("verdict(Tensor[] payloads) -> Tensor");
  m.def(
      "merge(Tensor payloads, int numel, int k, ScalarType wire_dtype, *, Tensor? skip=None) "
      "-> Tensor");
  m.def("apply_(Tensor(a!)[] params, Tensor aggregate, Tensor lr, *, Tensor? skip=None) -> ()");
  m.def(
      "restore_(Tensor(a!) memory, Tensor payload, int k, ScalarType wire_dtype, *, "
      "Tensor? skip=None) -> ()");
  m.def(
      "mask_(Tensor(a!) momentum_buffer, Tensor payload, int k, ScalarType wire_dtype, *, "
      "Tensor? skip=None) -> ()");
  m.def("sparsify(Tensor dense) -> Tensor");
  m.def("densify(Tensor aggregate, int numel) -> Tensor");
}

// One function serves every backend: it checks the arguments and then picks the kernels.
void register_ops(torch::Library& m) {
  m.impl("compress_", compress);
  m.impl("repairs", repairs);
  m.impl("unpack", unpack);
  m.impl("verdict", verdict);
  m.impl("merge", merge);
  m.impl("apply_", apply);
  m.impl("restore_", restore);
  m.impl("mask_", mask);
  m.impl("sparsify", sparsify);
  m.impl("densify", densify);
}

TORCH_LIBRARY_IMPL(gmc_cuda, CPU, m) { register_ops(m); }
TORCH_LIBRARY_IMPL(gmc_cuda, CUDA, m) { register_ops(m); }

}  // namespace gmc
