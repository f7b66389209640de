// The operators: for each its schema, and the checks that make of its arguments what a backend
// works on (calls.h). torch's dispatcher decides which backend that is.
#include <string>
#include <vector>

#include "boxed.h"
#include "checks.h"
#include "segments.h"
#include "shared/calls.h"
#include "tensor.h"
#ifdef GMC_WITH_CUDA
#include "stream.h"
#endif

namespace gmc {
namespace {

// ---------------------------------------------------------------------------------------------
// Backends
// ---------------------------------------------------------------------------------------------

struct Cpu {
  static int64_t state_nbytes(int64_t numel, int64_t k) { return cpu::state_nbytes(numel, k); }

  template <class Call>
  static void run(const char*, const Call& call, Device) {
    cpu::run(call);
  }
};

#ifdef GMC_WITH_CUDA
struct Cuda {
  static int64_t state_nbytes(int64_t numel, int64_t k) { return cuda::state_nbytes(numel, k); }

  template <class Call>
  static void run(const char*, const Call& call, Device device) {
    cuda::on_stream(device, [&](const cuda::Stream& stream) { cuda::run(call, stream); });
  }
};
#else
// What a build without CUDA kernels registers for CUDA tensors.
struct Cuda {
  static int64_t state_nbytes(int64_t numel, int64_t k) { return Cpu::state_nbytes(numel, k); }

  template <class Call>
  static void run(const char* schema, const Call&, Device) {
    raise("NotImplementedError", op_name(schema),
          ": this build of gmc_cuda has no CUDA kernels, so tensors must be on the CPU (nothing "
          "is copied silently)");
  }
};
#endif

// What CPU tensors are given to. The tests compile this file for an emulated device, whose memory
// is the CPU's and whose kernels are those of CUDA.
#ifdef GMC_EMULATED
using OnCpu = Cuda;
#else
using OnCpu = Cpu;
#endif

// ---------------------------------------------------------------------------------------------
// Sizes
// ---------------------------------------------------------------------------------------------

constexpr char kPayloadNbytes[] = "payload_nbytes(int numel, int k, ScalarType wire_dtype) -> int";

int64_t payload_nbytes(int64_t numel, int64_t k, ScalarType wire_dtype) {
  return PayloadLayout(check_shape(numel, k, wire_dtype)).nbytes;
}

constexpr char kAggregateNbytes[] = "aggregate_nbytes(int numel, int k, int ranks) -> int";

int64_t aggregate_nbytes(int64_t numel, int64_t k, int64_t ranks) {
  return AggregateLayout(numel, aggregate_capacity(numel, k, ranks)).nbytes;
}

constexpr char kStateNbytes[] = "state_nbytes(int numel, int k, Device device) -> int";

int64_t state_size(int64_t numel, int64_t k, bool cpu) {
  return cpu ? OnCpu::state_nbytes(numel, k) : Cuda::state_nbytes(numel, k);
}

int64_t state_nbytes(int64_t numel, int64_t k, torch::stable::Device device) {
  check_numel(numel, "numel");
  check_k(k, numel);
  return state_size(numel, k, !device.is_cuda());
}

// The ranges of a bucket that is cut, in schemas; with width=0 it is not.
#define GMC_RANGES "int width=0, int last_k=0"

// ---------------------------------------------------------------------------------------------
// The rule
// ---------------------------------------------------------------------------------------------

// The arguments that say how v is made, in the order of the schemas of compress_ and accumulate_.
#define GMC_RULE                                                                                 \
  "Tensor momentum, Tensor? aggregate=None, Tensor(b!)? momentum_buffer=None, "                  \
  "bool nesterov=False, float weight_decay=0.0, float memory_decay=1.0, Tensor[]? params=None, " \
  "bool maximize=False, Tensor? grad_scale=None, Tensor? found_inf=None"

struct RuleArguments {
  Arguments& in;
  Tensor momentum = in.take<Tensor>();
  OptionalTensor aggregate = in.take<OptionalTensor>();
  OptionalTensor momentum_buffer = in.take<OptionalTensor>();
  bool nesterov = in.take<bool>();
  double weight_decay = in.take<double>();
  double memory_decay = in.take<double>();
  std::optional<TensorList> params = in.take<std::optional<TensorList>>();
  bool maximize = in.take<bool>();
  OptionalTensor grad_scale = in.take<OptionalTensor>();
  OptionalTensor found_inf = in.take<OptionalTensor>();

  explicit RuleArguments(Arguments& in) : in(in) {}
};

// aggregate: the caller checks it, because it is sparse in one operator and dense in the other.
RuleCall rule_call(const Tensor& memory, const TensorOrNoneList& grads,
                   const RuleArguments& given) {
  const Device device(memory);
  const int64_t numel = memory.numel();
  check_numel(numel, "memory");
  check_vector(memory, "memory", device, ScalarType::Float, numel);
  RuleCall call = {};
  call.memory = mutable_data<float>(memory);
  call.numel = numel;
  call.momentum = check_number(given.momentum, "momentum", device);
  GMC_CHECK_VALUE(!(given.aggregate && given.momentum_buffer),
                  "aggregate: got a tensor beside momentum_buffer, must be None with local "
                  "momentum");
  GMC_CHECK_VALUE(!given.nesterov || given.momentum_buffer,
                  "nesterov: got True without momentum_buffer, must be False");
  if (given.momentum_buffer) {
    check_vector(*given.momentum_buffer, "momentum_buffer", device, ScalarType::Float, numel);
    call.momentum_buffer = mutable_data<float>(*given.momentum_buffer);
  }
  GMC_CHECK_VALUE(given.memory_decay >= 0 && given.memory_decay <= 2, "memory_decay: got ",
                  given.memory_decay, ", must be between 0 and 2");
  GMC_CHECK_VALUE(given.weight_decay == 0 || given.params,
                  "params: got None with weight_decay = ", given.weight_decay,
                  ", must be the parameters to decay");
  std::vector<int64_t> sizes;
  if (given.params) {
    call.params = check_segments(*given.params, "params", device, nullptr);
    for (const auto& segment : call.params) sizes.push_back(segment.numel);
    GMC_CHECK_VALUE(grads.size() == sizes.size() || has_places(grads), "grads: got ", grads.size(),
                    " tensors, must be ", sizes.size(), " like params");
  }
  call.grads = check_segments(grads, "grads", device, given.params ? &sizes : nullptr);
  const int64_t got = total_numel(call.grads);
  GMC_CHECK_VALUE(got == numel, "grads: got ", got, " elements in all, must be ", numel,
                  " like memory");
  if (given.weight_decay == 0) call.params.clear();
  call.grad_scale =
      given.grad_scale ? check_number(*given.grad_scale, "grad_scale", device) : scalar(1.0f);
  call.found_inf =
      given.found_inf ? check_number(*given.found_inf, "found_inf", device) : scalar(0.0f);
  call.options = {static_cast<float>(given.weight_decay), static_cast<float>(given.memory_decay),
                  given.maximize, given.nesterov};
  return call;
}

constexpr char kCompress[] =
    "compress_(Tensor(a!) memory, Tensor?[] grads, int k, *, " GMC_RULE
    ", ScalarType wire_dtype, Tensor(c!)? state=None, int tag=0, " GMC_RANGES ") -> Tensor";

Work<CompressCall, Tensor> compress(const Tensor& memory, const TensorOrNoneList& grads, int64_t k,
                                    const RuleArguments& rule, ScalarType wire_dtype,
                                    const OptionalTensor& state, int64_t tag, int64_t width,
                                    int64_t last_k) {
  const Device device(memory);
  CompressCall call = {};
  call.rule = rule_call(memory, grads, rule);
  call.ranges = check_ranges(memory.numel(), k, wire_dtype, width, last_k);
  GMC_CHECK_VALUE(tag >= 0 && tag < kTags, "tag: got ", tag, ", must be between 0 and 2**24 - 1");
  call.tag = static_cast<uint32_t>(tag);
  if (rule.aggregate) {
    GMC_CHECK_VALUE(width == 0, "aggregate: got a tensor beside width = ", width,
                    ", must be None: the owners of the ranges add it");
    call.aggregate = check_aggregate(*rule.aggregate, device, memory.numel());
  }
  if (state) {  // one for a larger k will do
    const int64_t needed = state_size(call.ranges.width(), k, device.is_cpu());
    check_tensor(*state, "state", device, ScalarType::Byte);
    if (width == 0) {
      GMC_CHECK_VALUE(state->dim() == 1 && state->numel() >= needed, "state: got shape ",
                      sizes_of(*state), ", must be [", needed, "] or longer");
    } else {
      GMC_CHECK_VALUE(state->dim() == 2 && state->size(0) == call.ranges.count &&
                          state->size(1) >= needed && state->size(1) % 16 == 0,
                      "state: got shape ", sizes_of(*state), ", must be [", call.ranges.count, ", ",
                      needed, "] or longer by multiples of 16");
    }
    call.states = writable_bytes(*state, "state");
    call.state_nbytes = state->numel() / call.ranges.count;
  }
  Tensor payloads = empty({call.ranges.nbytes()}, ScalarType::Byte, device);
  call.payloads = writable_bytes(payloads, "payload");
  return {std::move(call), device, {std::move(payloads)}};
}

constexpr char kAccumulate[] =
    "accumulate_(Tensor(a!) memory, Tensor?[] grads, *, int rank, int ranks, " GMC_RULE
    ") -> Tensor";

Work<AccumulateCall, Tensor> accumulate(const Tensor& memory, const TensorOrNoneList& grads,
                                        int64_t rank, int64_t ranks, const RuleArguments& rule) {
  const Device device(memory);
  const int64_t numel = memory.numel();
  AccumulateCall call = {};
  GMC_CHECK_VALUE(ranks >= 1, "ranks: got ", ranks, ", must be at least 1");
  GMC_CHECK_VALUE(rank >= 0 && rank < ranks, "rank: got ", rank,
                  ", must be between 0 and ranks - 1 = ", ranks - 1);
  call.rank = rank;
  call.ranks = ranks;
  call.rule = rule_call(memory, grads, rule);
  if (rule.aggregate) {
    check_vector(*rule.aggregate, "aggregate", device, ScalarType::Float, numel);
    call.aggregate = data<float>(*rule.aggregate);
  }
  Tensor total = empty({numel + ranks}, ScalarType::Float, device);
  call.total = mutable_data<float>(total);
  return {std::move(call), device, {std::move(total)}};
}

// ---------------------------------------------------------------------------------------------
// What moves parameters
// ---------------------------------------------------------------------------------------------

Skip skip_of(const OptionalTensor& skip, Device device, int64_t words = 1) {
  if (!skip) return {};
  check_vector(*skip, "skip", device, ScalarType::Int, words);
  return {data<int32_t>(*skip), nullptr, nullptr};
}

MoveCall move_call(const TensorList& params, const Tensor& lr, const OptionalTensor& skip,
                   const OptionalTensor& skipped_steps, const OptionalTensor& flags,
                   Device device) {
  MoveCall call = {};
  call.lr = check_number(lr, "lr", device);
  call.skip = skip_of(skip, device);
  if (skipped_steps) {
    check_vector(*skipped_steps, "skipped_steps", device, ScalarType::Long, 1);
    call.skip.skipped_steps = mutable_data<int64_t>(*skipped_steps);
  }
  if (flags) {
    check_vector(*flags, "flags", device, ScalarType::Int, 1);
    call.skip.flags = reinterpret_cast<uint32_t*>(mutable_data<int32_t>(*flags));
  }
  call.params = check_segments(params, "params", device, nullptr);
  return call;
}

constexpr char kApplyDense[] =
    "apply_dense_(Tensor(a!)[] params, Tensor(b!) memory, Tensor(c!) total, Tensor lr, *, "
    "Tensor? skip=None, Tensor(d!)? skipped_steps=None, Tensor(e!)? flags=None) -> ()";

Work<ApplyDenseCall> apply_dense(const TensorList& params, const Tensor& memory,
                                 const Tensor& total, const Tensor& lr, const OptionalTensor& skip,
                                 const OptionalTensor& skipped_steps, const OptionalTensor& flags) {
  const Device device(memory);
  const int64_t numel = memory.numel();
  check_numel(numel, "memory");
  check_vector(memory, "memory", device, ScalarType::Float, numel);
  check_tensor(total, "total", device, ScalarType::Float);
  GMC_CHECK_VALUE(total.dim() == 1 && total.numel() > numel, "total: got shape ", sizes_of(total),
                  ", must be [numel + ranks], numel = ", numel, " like memory");
  ApplyDenseCall call = {};
  call.move = move_call(params, lr, skip, skipped_steps, flags, device);
  const int64_t got = total_numel(call.move.params);
  GMC_CHECK_VALUE(got == numel, "params: got ", got, " elements in all, must be ", numel,
                  " like memory");
  call.memory = mutable_data<float>(memory);
  call.total = mutable_data<float>(total);
  call.numel = numel;
  call.ranks = total.numel() - numel;
  return {std::move(call), device, {}};
}

constexpr char kApply[] =
    "apply_(Tensor(a!)[] params, Tensor aggregate, Tensor lr, *, Tensor? skip=None, "
    "Tensor(b!)? skipped_steps=None, Tensor(c!)? flags=None, Tensor(d!)? memory=None, "
    "Tensor? payload=None, int k=0, ScalarType wire_dtype) -> ()";

Work<ApplyCall> apply(const TensorList& params, const Tensor& aggregate, const Tensor& lr,
                      const OptionalTensor& skip, const OptionalTensor& skipped_steps,
                      const OptionalTensor& flags, const OptionalTensor& memory,
                      const OptionalTensor& payload, int64_t k, ScalarType wire_dtype) {
  const Device device(aggregate);
  ApplyCall call = {};
  call.move = move_call(params, lr, skip, skipped_steps, flags, device);
  call.numel = total_numel(call.move.params);
  check_numel(call.numel, "params");
  call.aggregate = check_aggregate(aggregate, device, call.numel);
  GMC_CHECK_VALUE(memory.has_value() == payload.has_value(),
                  "memory: must be given together with payload");
  if (memory) {
    check_vector(*memory, "memory", device, ScalarType::Float, call.numel);
    call.memory = mutable_data<float>(*memory);
    call.payload = check_payload(*payload, device, call.numel, k, wire_dtype);
  }
  return {std::move(call), device, {}};
}

// ---------------------------------------------------------------------------------------------
// Payloads
// ---------------------------------------------------------------------------------------------

constexpr char kUnpack[] =
    "unpack(Tensor payload, int numel, int k, ScalarType wire_dtype) -> "
    "(Tensor indices, Tensor values, Tensor nonfinite)";

Work<UnpackCall, Tensor, Tensor, Tensor> unpack(const Tensor& payload, int64_t numel, int64_t k,
                                                ScalarType wire_dtype) {
  const Device device(payload);
  const Payload from = check_payload(payload, device, numel, k, wire_dtype);
  Tensor indices = empty({k}, ScalarType::Long, device);
  Tensor values = empty({k}, ScalarType::Float, device);
  Tensor nonfinite = empty({}, ScalarType::Long, device);
  return {{from, mutable_data<int64_t>(indices), mutable_data<float>(values),
           mutable_data<int64_t>(nonfinite)},
          device,
          {indices, values, nonfinite}};
}

constexpr char kVerdict[] = "verdict(Tensor[] payloads, Tensor[] counts) -> Tensor";

Work<VerdictCall, Tensor> verdict(const TensorList& payloads, const TensorList& counts) {
  GMC_CHECK_VALUE(!payloads.empty() || !counts.empty(),
                  "payloads: got an empty list, must hold one tensor a bucket");
  const Device device(payloads.empty() ? counts[0] : payloads[0]);
  VerdictCall call = {};
  for (size_t i = 0; i < payloads.size(); ++i) {
    const Tensor& payload = payloads[i];
    const Name name("payloads", i);
    check_tensor(payload, name, device, ScalarType::Byte);
    GMC_CHECK_VALUE(payload.dim() == 2 && payload.size(0) >= 1 &&
                        payload.size(1) >= static_cast<int64_t>(sizeof(PayloadHeader)),
                    name, ": got shape ", sizes_of(payload),
                    ", must be [world size, payload_nbytes]");
    call.buckets.push_back({data<uint8_t>(payload), payload.size(0), payload.size(1)});
  }
  for (size_t i = 0; i < counts.size(); ++i) {
    const int64_t numel = counts[i].numel();
    const Name name("counts", i);
    check_tensor(counts[i], name, device, ScalarType::Float);
    GMC_CHECK_VALUE(numel >= 2 && numel % 2 == 0, name, ": got ", numel,
                    " elements, must be a count for each rank and then a tag for each");
    const auto* numbers = reinterpret_cast<const uint8_t*>(data<float>(counts[i]));
    call.buckets.push_back({numbers, numel / 2, 0});
  }
  Tensor flags = empty({1}, ScalarType::Int, device);
  call.flags = reinterpret_cast<uint32_t*>(mutable_data<int32_t>(flags));
  return {std::move(call), device, {std::move(flags)}};
}

// What merge and merge_ share: all but the aggregate.
MergeCall merge_call(const Tensor& payloads, int64_t numel, int64_t k, ScalarType wire_dtype,
                     const OptionalTensor& skip) {
  const Device device(payloads);
  const PayloadShape shape = check_shape(numel, k, wire_dtype);
  check_tensor(payloads, "payloads", device, ScalarType::Byte);
  const int64_t nbytes = PayloadLayout(shape).nbytes;
  GMC_CHECK_VALUE(payloads.dim() == 2 && payloads.size(0) >= 1 && payloads.size(1) == nbytes,
                  "payloads: got shape ", sizes_of(payloads), ", must be [world size, ", nbytes,
                  "]");
  return {{readable_bytes(payloads, "payloads"), shape},
          payloads.size(0),
          skip_of(skip, device),
          nullptr};
}

constexpr char kMerge[] =
    "merge(Tensor payloads, int numel, int k, ScalarType wire_dtype, *, Tensor? skip=None) "
    "-> Tensor";

Work<MergeCall, Tensor> merge(const Tensor& payloads, int64_t numel, int64_t k,
                              ScalarType wire_dtype, const OptionalTensor& skip) {
  MergeCall call = merge_call(payloads, numel, k, wire_dtype, skip);
  const Device device(payloads);
  Tensor aggregate = empty({aggregate_nbytes(numel, k, call.ranks)}, ScalarType::Byte, device);
  call.aggregate = writable_bytes(aggregate, "aggregate");
  return {call, device, {std::move(aggregate)}};
}

constexpr char kMergeInplace[] =
    "merge_(Tensor(a!) aggregate, Tensor payloads, int numel, int k, ScalarType wire_dtype, *, "
    "Tensor? skip=None) -> ()";

Work<MergeCall> merge_inplace(const Tensor& aggregate, const Tensor& payloads, int64_t numel,
                              int64_t k, ScalarType wire_dtype, const OptionalTensor& skip) {
  MergeCall call = merge_call(payloads, numel, k, wire_dtype, skip);
  const Device device(payloads);
  check_vector(aggregate, "aggregate", device, ScalarType::Byte,
               aggregate_nbytes(numel, k, call.ranks));
  call.aggregate = writable_bytes(aggregate, "aggregate");
  return {call, device, {}};
}

constexpr char kMergeRanges[] =
    "merge_ranges(Tensor payloads, int numel, int width, int k, int last_k, "
    "ScalarType wire_dtype, *, Tensor? skip=None) -> Tensor";

Work<MergeRangesCall, Tensor> merge_ranges(const Tensor& payloads, int64_t numel, int64_t width,
                                           int64_t k, int64_t last_k, ScalarType wire_dtype,
                                           const OptionalTensor& skip) {
  const Device device(payloads);
  check_numel(numel, "numel");
  const Ranges ranges = check_cut(numel, k, wire_dtype, width, last_k);
  check_tensor(payloads, "payloads", device, ScalarType::Byte);
  const int64_t nbytes = PayloadLayout(ranges.full).nbytes;
  GMC_CHECK_VALUE(
      payloads.dim() == 2 && payloads.size(0) == ranges.count && payloads.size(1) == nbytes,
      "payloads: got shape ", sizes_of(payloads), ", must be [", ranges.count, ", ", nbytes, "]");
  Tensor aggregate =
      empty({AggregateLayout(numel, ranges.entries()).nbytes}, ScalarType::Byte, device);
  uint8_t* const bytes = writable_bytes(aggregate, "aggregate");
  return {{readable_bytes(payloads, "payloads"), ranges, skip_of(skip, device), bytes},
          device,
          {std::move(aggregate)}};
}

// What restore_ and mask_ share, all but the skip: payloads whose entries change a vector.
template <class Call>
Work<Call> on_entries(const Tensor& vector, Name name, const Tensor& payload, int64_t k,
                      ScalarType wire_dtype, int64_t width, int64_t last_k) {
  const Device device(vector);
  const int64_t numel = vector.numel();
  check_vector(vector, name, device, ScalarType::Float, numel);
  const Ranges ranges = check_ranges(numel, k, wire_dtype, width, last_k);
  check_vector(payload, "payload", device, ScalarType::Byte, ranges.nbytes());
  return {
      {mutable_data<float>(vector), readable_bytes(payload, "payload"), ranges, {}}, device, {}};
}

constexpr char kRestore[] =
    "restore_(Tensor(a!) memory, Tensor payload, int k, ScalarType wire_dtype, *, "
    "Tensor? skip=None, " GMC_RANGES ") -> ()";

Work<RestoreCall> restore(const Tensor& memory, const Tensor& payload, int64_t k,
                          ScalarType wire_dtype, const OptionalTensor& skip, int64_t width,
                          int64_t last_k) {
  auto work = on_entries<RestoreCall>(memory, "memory", payload, k, wire_dtype, width, last_k);
  RestoreCall& call = work.call;
  call.by_range = skip && width != 0 && skip->numel() != 1;
  call.skip = skip_of(skip, work.device, call.by_range ? call.ranges.count : 1);
  return work;
}

constexpr char kMask[] =
    "mask_(Tensor(a!) momentum_buffer, Tensor payload, int k, ScalarType wire_dtype, *, "
    "Tensor? skip=None, " GMC_RANGES ") -> ()";

Work<MaskCall> mask(const Tensor& momentum_buffer, const Tensor& payload, int64_t k,
                    ScalarType wire_dtype, const OptionalTensor& skip, int64_t width,
                    int64_t last_k) {
  auto work = on_entries<MaskCall>(momentum_buffer, "momentum_buffer", payload, k, wire_dtype,
                                   width, last_k);
  work.call.skip = skip_of(skip, work.device);
  return work;
}

// ---------------------------------------------------------------------------------------------
// Aggregates
// ---------------------------------------------------------------------------------------------

constexpr char kSparsify[] = "sparsify(Tensor dense) -> Tensor";

Work<SparsifyCall, Tensor> sparsify(const Tensor& dense) {
  const Device device(dense);
  const int64_t numel = dense.numel();
  check_numel(numel, "dense");
  check_vector(dense, "dense", device, ScalarType::Float, numel);
  Tensor aggregate = empty({AggregateLayout(numel, numel).nbytes}, ScalarType::Byte, device);
  uint8_t* const bytes = writable_bytes(aggregate, "aggregate");
  return {{data<float>(dense), numel, bytes}, device, {std::move(aggregate)}};
}

constexpr char kDensify[] = "densify(Tensor aggregate, int numel) -> Tensor";

Work<DensifyCall, Tensor> densify(const Tensor& aggregate, int64_t numel) {
  const Device device(aggregate);
  check_numel(numel, "numel");
  const Aggregate from = check_aggregate(aggregate, device, numel);
  Tensor dense = empty({numel}, ScalarType::Float, device);
  float* const values = mutable_data<float>(dense);
  return {{from, numel, values}, device, {std::move(dense)}};
}

// ---------------------------------------------------------------------------------------------
// Registration
// ---------------------------------------------------------------------------------------------

// Calls visit<schema, checks>() for each operator that a backend implements.
template <class Visitor>
void for_each_op(const Visitor& visit) {
  visit.template operator()<kCompress, &compress>();
  visit.template operator()<kAccumulate, &accumulate>();
  visit.template operator()<kApplyDense, &apply_dense>();
  visit.template operator()<kApply, &apply>();
  visit.template operator()<kUnpack, &unpack>();
  visit.template operator()<kVerdict, &verdict>();
  visit.template operator()<kMerge, &merge>();
  visit.template operator()<kMergeInplace, &merge_inplace>();
  visit.template operator()<kMergeRanges, &merge_ranges>();
  visit.template operator()<kRestore, &restore>();
  visit.template operator()<kMask, &mask>();
  visit.template operator()<kSparsify, &sparsify>();
  visit.template operator()<kDensify, &densify>();
}

template <class Backend>
void register_ops(torch::stable::detail::StableLibrary& m) {
  for_each_op([&]<const char* schema, auto check>() {
    m.impl(op_name(schema).c_str(), Boxed<Backend, schema, check>::run);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(gmc_cuda, m) {
  for (const char* schema : {kPayloadNbytes, kAggregateNbytes, kStateNbytes}) m.def(schema);
  for_each_op([&]<const char* schema, auto check>() { m.def(schema); });
}

STABLE_TORCH_LIBRARY_IMPL(gmc_cuda, CompositeImplicitAutograd, m) {
  m.impl("payload_nbytes", TORCH_BOX(&payload_nbytes));
  m.impl("aggregate_nbytes", TORCH_BOX(&aggregate_nbytes));
  m.impl("state_nbytes", TORCH_BOX(&state_nbytes));
}
STABLE_TORCH_LIBRARY_IMPL(gmc_cuda, CPU, m) { register_ops<OnCpu>(m); }
STABLE_TORCH_LIBRARY_IMPL(gmc_cuda, CUDA, m) { register_ops<Cuda>(m); }

}  // namespace gmc
