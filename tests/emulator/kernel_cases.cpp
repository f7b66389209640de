// Calls the CUDA backend from Python; kernel_ops.py is the other end.
#include <cuda_runtime.h>

#include <algorithm>

#include "case.h"

namespace {

// What a device says that knows no early starts, of which this counts the tries; 0: it knows them.
cudaError_t refusal = cudaSuccess;
int refused = 0;

template <class... Parameters, class... Arguments>
cudaError_t launch_or_refuse(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                             const Arguments&... arguments) {
  if (refusal == cudaSuccess || config->numAttrs == 0)
    return cudaLaunchKernelEx(config, kernel, arguments...);
  ++refused;
  cudaLaunchConfig_t wrong = *config;
  wrong.blockDim = dim3(0);
  (void)cudaLaunchKernelEx(&wrong, kernel, arguments...);  // leaves an error behind
  return refusal;
}

}  // namespace

#define cudaLaunchKernelEx launch_or_refuse
#include "cuda/launch.h"
#undef cudaLaunchKernelEx
#include "cuda/stream.h"
#include "cuda/workspace.h"
#include "shared/calls.h"

using namespace gmc;
using cuda::Stream;
using emulator::Case;

namespace {

// What a call works with on the device: freed after it.
class Device {
 public:
  Device() : stream_{nullptr, [this](int64_t nbytes) { return allocate(nbytes); }} {}
  Device(const Device&) = delete;
  ~Device() {
    for (void* memory : allocated_) require(cudaFree(memory));
  }

  template <class Call>
  void run(const Call& call) const {
    try {
      cuda::run(call, stream_);
      require(cudaDeviceSynchronize());
    } catch (const cuda::CudaError& error) {
      require(error.status);
    }
  }

  void* first() const { return allocated_.front(); }

 private:
  void* allocate(int64_t nbytes) {
    void* memory = nullptr;
    require(cudaMalloc(&memory, nbytes));
    allocated_.push_back(memory);
    return memory;
  }

  std::vector<void*> allocated_;
  const Stream stream_;
};

// A number by value, or in an array, which stands for device memory: float32 as such, float64.
Scalar number(Case& in, const char* name, float otherwise) {
  const std::string array = std::string(name) + "_array";
  if (in.has(array.c_str())) return {in.array<double>(array.c_str()), Scalar::kFloat64, 0.0f};
  return scalar(in.has(name) ? static_cast<float>(in.number(name)) : otherwise);
}

// Arrays <prefix>0, <prefix>1, ... whose element counts and dtype codes (-1: None) are listed.
std::vector<Segment> segments(Case& in, const std::string& prefix) {
  std::vector<Segment> list;
  const std::string sizes = prefix + "_sizes", dtypes = prefix + "_dtypes";
  if (!in.has(sizes.c_str())) return list;
  int64_t begin = 0;
  for (int64_t i = 0; i < in.count(sizes.c_str()); ++i) {
    const int64_t numel = in.array<int64_t>(sizes.c_str())[i];
    const int64_t dtype = in.array<int64_t>(dtypes.c_str())[i];
    const std::string name = prefix + std::to_string(i);
    void* data = nullptr;
    if (dtype == 0) data = in.array<float>(name.c_str());
    if (dtype > 0) data = in.array<uint16_t>(name.c_str());
    list.push_back({data, begin, numel, static_cast<DType>(std::max<int64_t>(dtype, 0))});
    begin += numel;
  }
  return list;
}

Payload payload(Case& in, const char* name) {
  return {in.array<uint8_t>(name),
          {in.integer("numel"), in.integer("k"), static_cast<WireType>(in.integer("wire"))}};
}

// numel and k are those of a full range; a case without last_numel has one that is not cut.
Ranges ranges(Case& in) {
  const PayloadShape full = {in.integer("numel"), in.integer("k"),
                             static_cast<WireType>(in.integer("wire"))};
  if (!in.has("last_numel")) return uncut(full);
  return {full, {in.integer("last_numel"), in.integer("last_k"), full.wire}, in.integer("ranges")};
}

Aggregate aggregate(Case& in) {
  if (!in.has("aggregate")) return {nullptr, 0};
  return {in.array<uint8_t>("aggregate"), in.count("aggregate")};
}

Skip skip(Case& in) {
  return {in.has("skip") ? in.array<int32_t>("skip") : nullptr,
          in.has("skipped_steps") ? in.array<int64_t>("skipped_steps") : nullptr,
          in.has("flags") ? in.array<uint32_t>("flags") : nullptr};
}

RuleCall rule(Case& in) {
  RuleCall call = {};
  call.memory = in.array<float>("memory");
  if (in.has("momentum_buffer")) call.momentum_buffer = in.array<float>("momentum_buffer");
  call.grads = segments(in, "grad");
  call.params = segments(in, "param");
  call.numel = in.count("memory");
  call.momentum = number(in, "momentum", 0.0f);
  call.grad_scale = number(in, "grad_scale", 1.0f);
  call.found_inf = number(in, "found_inf", 0.0f);
  call.options = {static_cast<float>(in.number("weight_decay")),
                  static_cast<float>(in.number("memory_decay")), in.integer("maximize") != 0,
                  in.integer("nesterov") != 0};
  return call;
}

MoveCall move(Case& in) { return {segments(in, "param"), number(in, "lr", 0.0f), skip(in)}; }

}  // namespace

namespace {

void add_one_kernel(int64_t* sum) {
  cuda::wait_for_previous();
  ++*sum;
}

}  // namespace

CUDA_CASE(early_start) {
  auto* const sum = in.output<int64_t>("sum", 1);
  *sum = 0;
  refusal = static_cast<cudaError_t>(in.integer("refusal"));
  refused = 0;
  cuda::early_on_device[0] = cuda::Early::kUnknown;
  cudaError_t status = cudaSuccess;
  try {
    for (int launch = 0; launch < 3; ++launch) cuda::launch_early(add_one_kernel, 1, 1, {}, sum);
  } catch (const cuda::CudaError& error) {
    status = error.status;
  }
  refusal = cudaSuccess;
  cuda::early_on_device[0] = cuda::Early::kUnknown;
  *in.output<int64_t>("refused", 1) = refused;
  *in.output<int64_t>("status", 1) = status;
  *in.output<int64_t>("left", 1) = cudaGetLastError();
}

CUDA_CASE(state_nbytes) {
  *in.output<int64_t>("nbytes", 1) = cuda::state_nbytes(in.integer("numel"), in.integer("k"));
}

CUDA_CASE(compress) {
  CompressCall call = {};
  call.rule = rule(in);
  call.ranges = ranges(in);
  call.aggregate = aggregate(in);
  call.tag = static_cast<uint32_t>(in.integer("tag"));
  if (in.has("state")) {
    call.states = in.array<uint8_t>("state");
    call.state_nbytes = in.count("state") / call.ranges.count;
  }
  call.payloads = in.output<uint8_t>("payload", call.ranges.nbytes());
  Device device;
  device.run(call);
  // Without a state, the workspace is the first that compress allocates.
  const auto* control =
      static_cast<const cuda::Control*>(call.states ? call.states : device.first());
  *in.output<int64_t>("repairs", 1) = static_cast<int64_t>(control->guess.repairs);
  *in.output<int64_t>("outcome", 1) = control->outcome;
  *in.output<int64_t>("from_memory", 1) = control->from_memory;
}

CUDA_CASE(accumulate) {
  AccumulateCall call = {};
  call.rule = rule(in);
  if (in.has("aggregate")) call.aggregate = in.array<float>("aggregate");
  call.rank = in.integer("rank");
  call.ranks = in.integer("ranks");
  call.total = in.output<float>("total", call.rule.numel + call.ranks);
  Device().run(call);
}

CUDA_CASE(apply_dense) {
  const int64_t numel = in.count("memory");
  Device().run(ApplyDenseCall{move(in), in.array<float>("memory"), in.array<float>("total"), numel,
                              in.count("total") - numel});
}

CUDA_CASE(verdict) {
  VerdictCall call = {};
  for (int64_t b = 0; b < in.integer("buckets"); ++b) {
    const std::string name = "payloads" + std::to_string(b);
    const int64_t ranks = in.array<int64_t>("ranks")[b];
    call.buckets.push_back(
        {in.array<uint8_t>(name.c_str()), ranks, in.count(name.c_str()) / ranks});
  }
  for (int64_t b = 0; b < in.integer("dense"); ++b) {
    const std::string name = "counts" + std::to_string(b);
    const auto* counts = in.array<float>(name.c_str());
    call.buckets.push_back(
        {reinterpret_cast<const uint8_t*>(counts), in.count(name.c_str()) / 2, 0});
  }
  call.flags = in.output<uint32_t>("flags", 1);
  Device().run(call);
}

CUDA_CASE(merge) {
  MergeCall call = {payload(in, "payloads"), in.integer("ranks"), skip(in), nullptr};
  const PayloadShape& shape = call.payloads.shape;
  const int64_t capacity = aggregate_capacity(shape.numel, shape.k, call.ranks);
  call.aggregate = in.output<uint8_t>("aggregate", AggregateLayout(shape.numel, capacity).nbytes);
  Device().run(call);
}

CUDA_CASE(merge_ranges) {
  const Ranges of = ranges(in);
  auto* out = in.output<uint8_t>("aggregate", AggregateLayout(of.numel(), of.entries()).nbytes);
  Device().run(MergeRangesCall{in.array<uint8_t>("payloads"), of, skip(in), out});
}

CUDA_CASE(apply) {
  ApplyCall call = {move(in), aggregate(in), in.integer("numel"), nullptr, {}};
  if (in.has("memory")) {
    call.memory = in.array<float>("memory");
    call.payload = payload(in, "payload");
  }
  Device().run(call);
}

CUDA_CASE(restore) {
  Device().run(RestoreCall{in.array<float>("memory"), in.array<uint8_t>("payload"), ranges(in),
                           skip(in), in.has("skip") && in.count("skip") > 1});
}

CUDA_CASE(mask) {
  Device().run(MaskCall{in.array<float>("momentum_buffer"), in.array<uint8_t>("payload"),
                        ranges(in), skip(in)});
}

CUDA_CASE(unpack) {
  const Payload from = payload(in, "payload");
  const int64_t k = from.shape.k;
  Device().run(UnpackCall{from, in.output<int64_t>("indices", k), in.output<float>("values", k),
                          in.output<int64_t>("nonfinite", 1)});
}

CUDA_CASE(sparsify) {
  const int64_t numel = in.count("dense");
  auto* out = in.output<uint8_t>("aggregate", AggregateLayout(numel, numel).nbytes);
  Device().run(SparsifyCall{in.array<float>("dense"), numel, out});
}

CUDA_CASE(densify) {
  const int64_t numel = in.integer("numel");
  Device().run(DensifyCall{aggregate(in), numel, in.output<float>("dense", numel)});
}
