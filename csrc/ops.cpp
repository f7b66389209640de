// The operators: all schemas, and for each the argument checks before any kernel runs.
#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "checks.h"
#include "cpu/kernels.h"
#include "cuda/tensors.h"
#include "rule.h"
#include "tensor.h"

namespace gmc {
namespace {

#ifdef GMC_WITH_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

// Which kernels an op takes. Guarded by `if constexpr (kWithCuda)`, calls of the CUDA kernels
// vanish from builds without them.
bool on_gpu(const Tensor& tensor, const char* op) {
  if (tensor.is_cpu()) return false;
  if (!kWithCuda)
    raise("NotImplementedError", op,
          ": this build of gmc_cuda has no CUDA kernels, so tensors must be on the CPU (nothing "
          "is copied silently)");
  return true;
}

const Tensor* get(const Tensor& tensor) { return &tensor; }
const Tensor* get(const OptionalTensor& tensor) { return tensor ? &*tensor : nullptr; }

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

std::vector<Segment> placed_segments(const Tensor& addresses, const Tensor& kinds) {
  std::vector<Segment> result;
  const int64_t count = addresses.numel(), *address = data<int64_t>(addresses);
  const int64_t* kind = data<int64_t>(kinds) + 1;
  result.reserve(count);
  for (int64_t i = 0, begin = 0; i < count; begin += kind[2 * i], ++i)
    result.push_back({reinterpret_cast<void*>(address[i]), begin, kind[2 * i],
                      static_cast<DType>(kind[2 * i + 1])});
  return result;
}

// Checks a bucket's tensors and lays them out one behind the other. Entries without a value
// take their size from `sizes`.
template <class List>
std::vector<Segment> segments(const List& tensors, const char* list, Device device,
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

int64_t total_numel(const std::vector<Segment>& segments) {
  return segments.empty() ? 0 : segments.back().begin + segments.back().numel;
}

bool skipped(const OptionalTensor& skip) { return skip && *data<int32_t>(*skip) != 0; }

// The arguments of the ops that move parameters, checked but for their numel.
MoveTensors move_tensors(const TensorList& params, const Tensor& lr, const OptionalTensor& skip,
                         const OptionalTensor& skipped_steps, const OptionalTensor& flags,
                         Device device) {
  check_number(lr, "lr", device);
  check_skip(skip, device);
  if (skipped_steps) check_vector(*skipped_steps, "skipped_steps", device, ScalarType::Long, 1);
  if (flags) check_vector(*flags, "flags", device, ScalarType::Int, 1);
  return {segments(params, "params", device, nullptr), lr, skip, skipped_steps, flags};
}

// Whether parameters stay as they are, which is counted, and why (CPU).
bool skipped(const MoveTensors& move) {
  if (!skipped(move.skip)) return false;
  if (move.skipped_steps) ++*mutable_data<int64_t>(*move.skipped_steps);
  if (move.flags)
    *mutable_data<int32_t>(*move.flags) |= *data<int32_t>(*move.skip) & static_cast<int32_t>(kKept);
  return true;
}

int64_t payload_nbytes(int64_t numel, int64_t k, ScalarType wire_dtype) {
  check_numel(numel, "numel");
  check_k(k, numel);
  return PayloadLayout({numel, k, check_wire_type(wire_dtype)}).nbytes;
}

int64_t aggregate_nbytes(int64_t numel, int64_t k, int64_t ranks) {
  return AggregateLayout(numel, aggregate_capacity(numel, k, ranks)).nbytes;
}

int64_t state_size(int64_t numel, int64_t k, bool gpu) {
  if constexpr (kWithCuda) {
    if (gpu) return cuda::state_nbytes(numel, k);
  }
  return cpu::kStateBytes;
}

int64_t state_nbytes(int64_t numel, int64_t k, torch::stable::Device device) {
  check_numel(numel, "numel");
  check_k(k, numel);
  return state_size(numel, k, device.is_cuda());
}

using TensorOrNoneList = std::vector<OptionalTensor>;

// The rule's arguments besides memory, which was checked before.
RuleTensors rule_tensors(const Tensor& memory, const TensorOrNoneList& grads,
                         const Tensor& momentum, bool global_momentum,
                         const OptionalTensor& momentum_buffer, bool nesterov, double weight_decay,
                         double memory_decay, const std::optional<TensorList>& params,
                         bool maximize, const OptionalTensor& grad_scale,
                         const OptionalTensor& found_inf) {
  const Device device(memory);
  const int64_t numel = memory.numel();
  check_number(momentum, "momentum", device);
  GMC_CHECK_VALUE(!(global_momentum && momentum_buffer),
                  "aggregate: got a tensor beside momentum_buffer, must be None with local "
                  "momentum");
  GMC_CHECK_VALUE(!nesterov || momentum_buffer,
                  "nesterov: got True without momentum_buffer, must be False");
  if (momentum_buffer)
    check_vector(*momentum_buffer, "momentum_buffer", device, ScalarType::Float, numel);
  GMC_CHECK_VALUE(memory_decay >= 0 && memory_decay <= 1, "memory_decay: got ", memory_decay,
                  ", must be between 0 and 1");
  GMC_CHECK_VALUE(weight_decay == 0 || params,
                  "params: got None with weight_decay = ", weight_decay,
                  ", must be the parameters to decay");

  std::vector<Segment> param_segments;
  std::vector<int64_t> sizes;
  if (params) {
    param_segments = segments(*params, "params", device, nullptr);
    for (const auto& segment : param_segments) sizes.push_back(segment.numel);
    GMC_CHECK_VALUE(grads.size() == sizes.size() || has_places(grads), "grads: got ", grads.size(),
                    " tensors, must be ", sizes.size(), " like params");
  }
  std::vector<Segment> grad_segments = segments(grads, "grads", device, params ? &sizes : nullptr);
  GMC_CHECK_VALUE(total_numel(grad_segments) == numel, "grads: got ", total_numel(grad_segments),
                  " elements in all, must be ", numel, " like memory");
  if (grad_scale) check_number(*grad_scale, "grad_scale", device);
  if (found_inf) check_number(*found_inf, "found_inf", device);
  if (weight_decay == 0) param_segments.clear();
  return {memory,
          momentum_buffer,
          std::move(grad_segments),
          std::move(param_segments),
          momentum,
          grad_scale,
          found_inf,
          static_cast<float>(weight_decay),
          static_cast<float>(memory_decay),
          maximize,
          nesterov};
}

cpu::RuleArgs rule_args(RuleTensors&& rule) {
  const float scale = rule.grad_scale ? number(*rule.grad_scale) : 1.0f;
  return {
      .memory = mutable_data<float>(rule.memory),
      .momentum_buffer =
          rule.momentum_buffer ? mutable_data<float>(*rule.momentum_buffer) : nullptr,
      .grads = std::move(rule.grads),
      .params = std::move(rule.params),
      .numel = rule.memory.numel(),
      .momentum = number(rule.momentum),
      .weight_decay = rule.weight_decay,
      .memory_decay = rule.memory_decay,
      .grad_factor = gradient_factor(scale, rule.maximize),
      .nesterov = rule.nesterov,
      .found_inf = rule.found_inf && number(*rule.found_inf) != 0,
  };
}

Tensor compress(const Tensor& memory, const TensorOrNoneList& grads, int64_t k,
                const Tensor& momentum, const OptionalTensor& aggregate,
                const OptionalTensor& momentum_buffer, bool nesterov, double weight_decay,
                double memory_decay, const std::optional<TensorList>& params, bool maximize,
                const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                ScalarType wire_dtype, const OptionalTensor& state, int64_t tag) {
  const Device device(memory);
  const int64_t numel = memory.numel();
  check_numel(numel, "memory");
  check_vector(memory, "memory", device, ScalarType::Float, numel);
  check_k(k, numel);
  const WireType wire = check_wire_type(wire_dtype);
  GMC_CHECK_VALUE(tag >= 0 && tag < kTags, "tag: got ", tag, ", must be between 0 and 2**24 - 1");
  RuleTensors rule =
      rule_tensors(memory, grads, momentum, aggregate.has_value(), momentum_buffer, nesterov,
                   weight_decay, memory_decay, params, maximize, grad_scale, found_inf);
  if (aggregate) check_aggregate(*aggregate, device, numel);
  if (state) {  // one for a larger k will do
    const int64_t needed = state_size(numel, k, !device.is_cpu());
    check_tensor(*state, "state", device, ScalarType::Byte);
    GMC_CHECK_VALUE(state->dim() == 1 && state->numel() >= needed, "state: got shape ",
                    sizes_of(*state), ", must be [", needed, "] or longer");
  }
  const bool gpu = on_gpu(memory, "compress_");

  Tensor payload = empty({PayloadLayout({numel, k, wire}).nbytes}, ScalarType::Byte, device);
  if (gpu) {
    if constexpr (kWithCuda)
      cuda::compress(rule, aggregate, k, wire, static_cast<uint32_t>(tag), payload, state);
    return payload;
  }
  cpu::compress({
      .rule = rule_args(std::move(rule)),
      .aggregate = aggregate ? data<uint8_t>(*aggregate) : nullptr,
      .k = k,
      .wire = wire,
      .tag = static_cast<uint32_t>(tag),
      .payload = mutable_data<uint8_t>(payload),
      .state = state ? mutable_data<uint8_t>(*state) : nullptr,
  });
  return payload;
}

Tensor accumulate(const Tensor& memory, const TensorOrNoneList& grads, int64_t rank, int64_t ranks,
                  const Tensor& momentum, const OptionalTensor& aggregate,
                  const OptionalTensor& momentum_buffer, bool nesterov, double weight_decay,
                  double memory_decay, const std::optional<TensorList>& params, bool maximize,
                  const OptionalTensor& grad_scale, const OptionalTensor& found_inf) {
  const Device device(memory);
  const int64_t numel = memory.numel();
  check_numel(numel, "memory");
  check_vector(memory, "memory", device, ScalarType::Float, numel);
  GMC_CHECK_VALUE(ranks >= 1, "ranks: got ", ranks, ", must be at least 1");
  GMC_CHECK_VALUE(rank >= 0 && rank < ranks, "rank: got ", rank,
                  ", must be between 0 and ranks - 1 = ", ranks - 1);
  RuleTensors rule =
      rule_tensors(memory, grads, momentum, aggregate.has_value(), momentum_buffer, nesterov,
                   weight_decay, memory_decay, params, maximize, grad_scale, found_inf);
  if (aggregate) check_vector(*aggregate, "aggregate", device, ScalarType::Float, numel);
  const bool gpu = on_gpu(memory, "accumulate_");
  Tensor total = empty({numel + ranks}, ScalarType::Float, device);
  if (gpu) {
    if constexpr (kWithCuda) cuda::accumulate(rule, aggregate, rank, ranks, total);
    return total;
  }
  cpu::accumulate({
      .rule = rule_args(std::move(rule)),
      .aggregate = aggregate ? data<float>(*aggregate) : nullptr,
      .total = mutable_data<float>(total),
      .rank = rank,
      .ranks = ranks,
  });
  return total;
}

void apply_dense(const TensorList& params, const Tensor& memory, const Tensor& total,
                 const Tensor& lr, const OptionalTensor& skip, const OptionalTensor& skipped_steps,
                 const OptionalTensor& flags) {
  const Device device(memory);
  const int64_t numel = memory.numel();
  check_numel(numel, "memory");
  check_vector(memory, "memory", device, ScalarType::Float, numel);
  check_tensor(total, "total", device, ScalarType::Float);
  GMC_CHECK_VALUE(total.dim() == 1 && total.numel() > numel, "total: got shape ", sizes_of(total),
                  ", must be [numel + ranks], numel = ", numel, " like memory");
  MoveTensors move = move_tensors(params, lr, skip, skipped_steps, flags, device);
  const int64_t got = total_numel(move.params);
  GMC_CHECK_VALUE(got == numel, "params: got ", got, " elements in all, must be ", numel,
                  " like memory");
  const int64_t ranks = total.numel() - numel;
  if (on_gpu(memory, "apply_dense_")) {
    if constexpr (kWithCuda) cuda::apply_dense(move, memory, total, ranks);
    return;
  }
  const bool skips = skipped(move);
  cpu::apply_dense({
      .params = std::move(move.params),
      .memory = mutable_data<float>(memory),
      .total = mutable_data<float>(total),
      .numel = numel,
      .ranks = ranks,
      .lr = number(lr),
      .skip = skips,
  });
}

int64_t repairs(const Tensor& state) {
  if (on_gpu(state, "repairs")) {
    check_tensor(state, "state", Device(state), ScalarType::Byte);
    GMC_CHECK_VALUE(state.dim() == 1 && state.numel() > cpu::kStateBytes, "state: got shape ",
                    sizes_of(state), ", must come from select_state");
    if constexpr (kWithCuda) return cuda::repairs(state);
  }
  check_tensor(state, "state", Device(state), ScalarType::Byte);
  GMC_CHECK_VALUE(state.dim() == 1 && state.numel() >= cpu::kStateBytes, "state: got shape ",
                  sizes_of(state), ", must come from select_state");
  return cpu::state_repairs(data<uint8_t>(state));
}

// Checks the arguments that all readers of one payload share.
PayloadTensor payload_tensor(const Tensor& payload, Device device, int64_t numel, int64_t k,
                             ScalarType wire_dtype) {
  check_numel(numel, "numel");
  check_k(k, numel);
  const PayloadShape shape{numel, k, check_wire_type(wire_dtype)};
  check_payload(payload, device, shape);
  return {payload, shape};
}

Payload payload_args(const PayloadTensor& payload) {
  return {data<uint8_t>(payload.bytes), payload.shape};
}

std::tuple<Tensor, Tensor, Tensor> unpack(const Tensor& payload, int64_t numel, int64_t k,
                                          ScalarType wire_dtype) {
  const Device device(payload);
  const auto args = payload_tensor(payload, device, numel, k, wire_dtype);
  const bool gpu = on_gpu(payload, "unpack");
  const Tensor indices = empty({k}, ScalarType::Long, device);
  const Tensor values = empty({k}, ScalarType::Float, device);
  const Tensor nonfinite = empty({}, ScalarType::Long, device);
  if (gpu) {
    if constexpr (kWithCuda) cuda::unpack(args, indices, values, nonfinite);
  } else {
    cpu::unpack(payload_args(args), mutable_data<int64_t>(indices), mutable_data<float>(values),
                mutable_data<int64_t>(nonfinite));
  }
  return {indices, values, nonfinite};
}

// Gathered payloads of which only the size is known.
void check_gathered(const Tensor& payloads, Name name, Device device) {
  check_tensor(payloads, name, device, ScalarType::Byte);
  GMC_CHECK_VALUE(payloads.dim() == 2 && payloads.size(0) >= 1 &&
                      payloads.size(1) >= static_cast<int64_t>(sizeof(PayloadHeader)),
                  name, ": got shape ", sizes_of(payloads),
                  ", must be [world size, payload_nbytes]");
}

Tensor verdict(const TensorList& payloads, const TensorList& counts) {
  GMC_CHECK_VALUE(!payloads.empty() || !counts.empty(),
                  "payloads: got an empty list, must hold one tensor a bucket");
  const Tensor& any = payloads.empty() ? counts[0] : payloads[0];
  const Device device(any);
  for (size_t i = 0; i < payloads.size(); ++i)
    check_gathered(payloads[i], Name("payloads", i), device);
  for (size_t i = 0; i < counts.size(); ++i) {
    check_tensor(counts[i], Name("counts", i), device, ScalarType::Float);
    GMC_CHECK_VALUE(counts[i].numel() >= 2 && counts[i].numel() % 2 == 0, Name("counts", i),
                    ": got ", counts[i].numel(),
                    " elements, must be a count for each rank and then a tag for each");
  }
  const bool gpu = on_gpu(any, "verdict");
  const Tensor verdict = empty({1}, ScalarType::Int, device);
  if (gpu) {
    if constexpr (kWithCuda) cuda::verdict(payloads, counts, verdict);
    return verdict;
  }
  uint32_t flags = 0;
  for (const Tensor& payload : payloads)
    flags |= cpu::verdict(data<uint8_t>(payload), payload.size(0), payload.size(1));
  for (const Tensor& count : counts) flags |= cpu::verdict(data<float>(count), count.numel() / 2);
  *mutable_data<int32_t>(verdict) = static_cast<int32_t>(flags);
  return verdict;
}

Tensor payload_nonfinite(const Tensor& payloads) {
  const Device device(payloads);
  check_gathered(payloads, "payloads", device);
  const bool gpu = on_gpu(payloads, "payload_nonfinite");
  const int64_t ranks = payloads.size(0);
  const Tensor nonfinite = empty({ranks}, ScalarType::Long, device);
  if (gpu) {
    if constexpr (kWithCuda) cuda::payload_nonfinite(payloads, nonfinite);
  } else {
    cpu::payload_nonfinite(data<uint8_t>(payloads), ranks, payloads.size(1),
                           mutable_data<int64_t>(nonfinite));
  }
  return nonfinite;
}

Tensor fingerprint(const TensorList& params) {
  GMC_CHECK_VALUE(!params.empty(), "params: got an empty list, must hold at least one");
  const Device device(params[0]);
  const auto list = segments(params, "params", device, nullptr);
  const bool gpu = on_gpu(params[0], "fingerprint");
  const Tensor prints = empty({static_cast<int64_t>(list.size())}, ScalarType::Long, device);
  if (gpu) {
    if constexpr (kWithCuda) cuda::fingerprint(list, prints);
  } else {
    cpu::fingerprint(list, list.back().begin + list.back().numel,
                     reinterpret_cast<uint64_t*>(mutable_data<int64_t>(prints)));
  }
  return prints;
}

Tensor aggregate_flags(const TensorList& aggregates) {
  GMC_CHECK_VALUE(!aggregates.empty(), "aggregates: got an empty list, must hold at least one");
  const Device device(aggregates[0]);
  for (size_t i = 0; i < aggregates.size(); ++i) {
    const Name name("aggregates", i);
    check_tensor(aggregates[i], name, device, ScalarType::Byte);
    GMC_CHECK_VALUE(aggregates[i].numel() >= static_cast<int64_t>(sizeof(AggregateHeader)), name,
                    ": got shape ", sizes_of(aggregates[i]), ", must come from merge or sparsify");
  }
  const bool gpu = on_gpu(aggregates[0], "aggregate_flags");
  const Tensor flags = empty({static_cast<int64_t>(aggregates.size())}, ScalarType::Int, device);
  if (gpu) {
    if constexpr (kWithCuda) cuda::aggregate_flags(aggregates, flags);
    return flags;
  }
  auto* out = mutable_data<int32_t>(flags);
  for (const Tensor& aggregate : aggregates)
    *out++ = static_cast<int32_t>(at<AggregateHeader>(data<uint8_t>(aggregate), 0)->flags);
  return flags;
}

// into: what to overwrite; none: a new aggregate. Returns it.
Tensor merge_into(const OptionalTensor& into, const Tensor& payloads, int64_t numel, int64_t k,
                  ScalarType wire_dtype, const OptionalTensor& skip) {
  check_numel(numel, "numel");
  check_k(k, numel);
  const PayloadShape shape{numel, k, check_wire_type(wire_dtype)};
  const Device device(payloads);
  check_tensor(payloads, "payloads", device, ScalarType::Byte);
  const int64_t nbytes = PayloadLayout(shape).nbytes;
  GMC_CHECK_VALUE(payloads.dim() == 2 && payloads.size(0) >= 1 && payloads.size(1) == nbytes,
                  "payloads: got shape ", sizes_of(payloads), ", must be [world size, ", nbytes,
                  "]");
  check_skip(skip, device);
  const bool gpu = on_gpu(payloads, "merge");
  const int64_t ranks = payloads.size(0);
  const int64_t aggregate_size = aggregate_nbytes(numel, k, ranks);
  if (into) check_vector(*into, "aggregate", device, ScalarType::Byte, aggregate_size);
  Tensor aggregate = into ? *into : empty({aggregate_size}, ScalarType::Byte, device);
  const PayloadTensor args{payloads, shape};
  if (gpu) {
    if constexpr (kWithCuda) cuda::merge(args, ranks, skip, aggregate);
  } else {
    cpu::merge(payload_args(args), ranks, skipped(skip), mutable_data<uint8_t>(aggregate));
  }
  return aggregate;
}

Tensor merge(const Tensor& payloads, int64_t numel, int64_t k, ScalarType wire_dtype,
             const OptionalTensor& skip) {
  return merge_into(std::nullopt, payloads, numel, k, wire_dtype, skip);
}

void merge_inplace(const Tensor& aggregate, const Tensor& payloads, int64_t numel, int64_t k,
                   ScalarType wire_dtype, const OptionalTensor& skip) {
  merge_into(aggregate, payloads, numel, k, wire_dtype, skip);
}

void apply(const TensorList& params, const Tensor& aggregate, const Tensor& lr,
           const OptionalTensor& skip, const OptionalTensor& skipped_steps,
           const OptionalTensor& flags, const OptionalTensor& memory, const OptionalTensor& payload,
           int64_t k, ScalarType wire_dtype) {
  const Device device(aggregate);
  const MoveTensors move = move_tensors(params, lr, skip, skipped_steps, flags, device);
  const int64_t numel = total_numel(move.params);
  check_numel(numel, "params");
  check_aggregate(aggregate, device, numel);
  GMC_CHECK_VALUE(memory.has_value() == payload.has_value(),
                  "memory: must be given together with payload");
  std::optional<PayloadTensor> own;
  if (memory) {
    check_vector(*memory, "memory", device, ScalarType::Float, numel);
    own = payload_tensor(*payload, device, numel, k, wire_dtype);
  }
  if (on_gpu(aggregate, "apply_")) {
    if constexpr (kWithCuda) cuda::apply(move, aggregate, numel, memory, own);
  } else if (!skipped(move)) {
    cpu::apply(move.params, data<uint8_t>(aggregate), numel, number(lr));
  } else if (memory) {
    cpu::restore(mutable_data<float>(*memory), payload_args(*own));
  }
}

void restore(const Tensor& memory, const Tensor& payload, int64_t k, ScalarType wire_dtype,
             const OptionalTensor& skip) {
  check_vector(memory, "memory", Device(memory), ScalarType::Float, memory.numel());
  const auto args = payload_tensor(payload, Device(memory), memory.numel(), k, wire_dtype);
  check_skip(skip, Device(memory));
  if (on_gpu(memory, "restore_")) {
    if constexpr (kWithCuda) cuda::restore(memory, args, skip);
  } else if (!skip || skipped(skip)) {
    cpu::restore(mutable_data<float>(memory), payload_args(args));
  }
}

void mask(const Tensor& momentum_buffer, const Tensor& payload, int64_t k, ScalarType wire_dtype,
          const OptionalTensor& skip) {
  const Device device(momentum_buffer);
  const int64_t numel = momentum_buffer.numel();
  check_vector(momentum_buffer, "momentum_buffer", device, ScalarType::Float, numel);
  const auto args = payload_tensor(payload, device, numel, k, wire_dtype);
  check_skip(skip, device);
  if (on_gpu(momentum_buffer, "mask_")) {
    if constexpr (kWithCuda) cuda::mask(momentum_buffer, args, skip);
  } else if (!skipped(skip)) {
    cpu::mask(mutable_data<float>(momentum_buffer), payload_args(args));
  }
}

Tensor sparsify(const Tensor& dense) {
  check_numel(dense.numel(), "dense");
  check_vector(dense, "dense", Device(dense), ScalarType::Float, dense.numel());
  const bool gpu = on_gpu(dense, "sparsify");
  const int64_t numel = dense.numel();
  const Tensor aggregate =
      empty({AggregateLayout(numel, numel).nbytes}, ScalarType::Byte, Device(dense));
  if (gpu) {
    if constexpr (kWithCuda) cuda::sparsify(dense, aggregate);
  } else {
    cpu::sparsify(data<float>(dense), numel, mutable_data<uint8_t>(aggregate));
  }
  return aggregate;
}

Tensor densify(const Tensor& aggregate, int64_t numel) {
  check_numel(numel, "numel");
  check_aggregate(aggregate, Device(aggregate), numel);
  const bool gpu = on_gpu(aggregate, "densify");
  Tensor dense = empty({numel}, ScalarType::Float, Device(aggregate));
  if (gpu) {
    if constexpr (kWithCuda) cuda::densify(aggregate, dense);
  } else {
    cpu::densify(data<uint8_t>(aggregate), numel, mutable_data<float>(dense));
  }
  return dense;
}

}  // namespace

STABLE_TORCH_LIBRARY(gmc_cuda, m) {
  m.def("payload_nbytes(int numel, int k, ScalarType wire_dtype) -> int");
  m.def("aggregate_nbytes(int numel, int k, int ranks) -> int");
  m.def("state_nbytes(int numel, int k, Device device) -> int");
  m.def(
      "compress_(Tensor(a!) memory, Tensor?[] grads, int k, *, Tensor momentum, "
      "Tensor? aggregate=None, Tensor(b!)? momentum_buffer=None, bool nesterov=False, "
      "float weight_decay=0.0, float memory_decay=1.0, Tensor[]? params=None, "
      "bool maximize=False, Tensor? grad_scale=None, Tensor? found_inf=None, "
      "ScalarType wire_dtype, Tensor(c!)? state=None, int tag=0) -> Tensor");
  m.def("repairs(Tensor state) -> int");
  m.def(
      "accumulate_(Tensor(a!) memory, Tensor?[] grads, *, int rank, int ranks, Tensor momentum, "
      "Tensor? aggregate=None, Tensor(b!)? momentum_buffer=None, bool nesterov=False, "
      "float weight_decay=0.0, float memory_decay=1.0, Tensor[]? params=None, "
      "bool maximize=False, Tensor? grad_scale=None, Tensor? found_inf=None) -> Tensor");
  m.def(
      "apply_dense_(Tensor(a!)[] params, Tensor(b!) memory, Tensor(c!) total, Tensor lr, *, "
      "Tensor? skip=None, Tensor(d!)? skipped_steps=None, Tensor(e!)? flags=None) -> ()");
  m.def(
      "unpack(Tensor payload, int numel, int k, ScalarType wire_dtype) -> "
      "(Tensor indices, Tensor values, Tensor nonfinite)");
  m.def("verdict(Tensor[] payloads, Tensor[] counts) -> Tensor");
  m.def("payload_nonfinite(Tensor payloads) -> Tensor");
  m.def("aggregate_flags(Tensor[] aggregates) -> Tensor");
  m.def("fingerprint(Tensor[] params) -> Tensor");
  m.def(
      "merge(Tensor payloads, int numel, int k, ScalarType wire_dtype, *, Tensor? skip=None) "
      "-> Tensor");
  m.def(
      "merge_(Tensor(a!) aggregate, Tensor payloads, int numel, int k, ScalarType wire_dtype, *, "
      "Tensor? skip=None) -> ()");
  m.def(
      "apply_(Tensor(a!)[] params, Tensor aggregate, Tensor lr, *, Tensor? skip=None, "
      "Tensor(b!)? skipped_steps=None, Tensor(c!)? flags=None, Tensor(d!)? memory=None, "
      "Tensor? payload=None, int k=0, ScalarType wire_dtype) -> ()");
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
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("compress_", TORCH_BOX(&compress));
  m.impl("accumulate_", TORCH_BOX(&accumulate));
  m.impl("apply_dense_", TORCH_BOX(&apply_dense));
  m.impl("repairs", TORCH_BOX(&repairs));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("verdict", TORCH_BOX(&verdict));
  m.impl("payload_nonfinite", TORCH_BOX(&payload_nonfinite));
  m.impl("aggregate_flags", TORCH_BOX(&aggregate_flags));
  m.impl("fingerprint", TORCH_BOX(&fingerprint));
  m.impl("merge", TORCH_BOX(&merge));
  m.impl("merge_", TORCH_BOX(&merge_inplace));
  m.impl("apply_", TORCH_BOX(&apply));
  m.impl("restore_", TORCH_BOX(&restore));
  m.impl("mask_", TORCH_BOX(&mask));
  m.impl("sparsify", TORCH_BOX(&sparsify));
  m.impl("densify", TORCH_BOX(&densify));
}

STABLE_TORCH_LIBRARY_IMPL(gmc_cuda, CompositeImplicitAutograd, m) {
  m.impl("payload_nbytes", TORCH_BOX(&payload_nbytes));
  m.impl("aggregate_nbytes", TORCH_BOX(&aggregate_nbytes));
  m.impl("state_nbytes", TORCH_BOX(&state_nbytes));
}
STABLE_TORCH_LIBRARY_IMPL(gmc_cuda, CPU, m) { register_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(gmc_cuda, CUDA, m) { register_ops(m); }

}  // namespace gmc
