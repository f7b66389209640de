#include "cuda/tensors.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "checks.h"
#include "cuda/compress.h"
#include "cuda/error.h"
#include "cuda/kernels.h"
#include "cuda/segment_table.h"
#include "rule.h"

// Absent from builds of torch without CUDA, in which this library must load all the same.
#pragma weak aoti_torch_get_current_cuda_stream

namespace gmc::cuda {
namespace {

void check_cuda(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error("CUDA error: " + explain(status));
}

// The tensor's device is current as long as this lives.
struct Place {
  explicit Place(const Tensor& tensor) : device(tensor), guard(device.index) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index, &current));
    stream = static_cast<cudaStream_t>(current);
  }

  Device device;
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

// Opaque bytes are read 16 at a time at most; fresh tensors are aligned to far more.
uint8_t* bytes_of(const Tensor& tensor, const char* name) {
  auto* data = mutable_data<uint8_t>(tensor);
  GMC_CHECK_VALUE(reinterpret_cast<uintptr_t>(data) % 16 == 0, name,
                  ": got a view that begins at byte ", tensor.storage_offset(),
                  " of its storage, must begin at a multiple of 16");
  return data;
}

Scalar scalar_of(const Tensor& tensor, const char* name) {
  if (tensor.is_cpu()) return scalar(number(tensor));
  const auto at = [&](gmc::cuda::ScalarType type) {
    return Scalar{tensor.const_data_ptr(), type, 0.0f};
  };
  switch (tensor.scalar_type()) {
    case gmc::ScalarType::Float:
      return at(ScalarType::kFloat32);
    case gmc::ScalarType::BFloat16:
      return at(ScalarType::kBFloat16);
    case gmc::ScalarType::Half:
      return at(ScalarType::kFloat16);
    case gmc::ScalarType::Double:
      return at(ScalarType::kFloat64);
    default:
      raise("TypeError", name, ": got ", dtype_name(tensor.scalar_type()),
            ", must be torch.float32, bfloat16, float16 or float64");
  }
}

const int32_t* skip_of(const OptionalTensor& skip) { return skip ? data<int32_t>(*skip) : nullptr; }

Gathered gathered_of(const Tensor& payloads) {
  return {data<uint8_t>(payloads), payloads.size(0), payloads.size(1)};
}

Payload payload_of(const PayloadTensor& payload, const char* name) {
  return {bytes_of(payload.bytes, name), payload.shape};
}

Aggregate aggregate_of(const OptionalTensor& aggregate) {
  if (!aggregate) return {nullptr, 0};
  return {bytes_of(*aggregate, "aggregate"), aggregate->numel()};
}

// Device memory that lives as long as this: until kernels that use it are on their stream.
struct Temporaries {
  const Place& place;
  std::vector<Tensor> tensors;

  void* operator()(int64_t nbytes) {
    tensors.push_back(empty({nbytes}, gmc::ScalarType::Byte, place.device));
    return mutable_data<uint8_t>(tensors.back());
  }
};

SegmentList place_table(const std::vector<Segment>& segments, SegmentPiece* own, int* used,
                        Temporaries* temporaries) {
  SegmentList list;
  check_cuda(place_segments(segments, own, used, *temporaries, temporaries->place.stream, &list));
  return list;
}

void fill_rule(const RuleTensors& rule, Temporaries* temporaries, RuleArgs* args) {
  args->memory = mutable_data<float>(rule.memory);
  if (rule.momentum_buffer) args->momentum_buffer = mutable_data<float>(*rule.momentum_buffer);
  int used = 0;
  args->grads = place_table(rule.grads, &args->own, &used, temporaries);
  args->params = place_table(rule.params, &args->own, &used, temporaries);
  args->numel = rule.memory.numel();
  args->momentum = scalar_of(rule.momentum, "momentum");
  args->grad_scale = rule.grad_scale ? scalar_of(*rule.grad_scale, "grad_scale") : scalar(1.0f);
  args->found_inf = rule.found_inf ? scalar_of(*rule.found_inf, "found_inf") : scalar(0.0f);
  args->weight_decay = rule.weight_decay;
  args->memory_decay = rule.memory_decay;
  args->maximize = rule.maximize;
  args->nesterov = rule.nesterov;
}

void fill_move(const MoveTensors& move, Temporaries* temporaries, MoveArgs* args) {
  args->lr = scalar_of(move.lr, "lr");
  args->skip = skip_of(move.skip);
  args->skipped_steps = move.skipped_steps ? mutable_data<int64_t>(*move.skipped_steps) : nullptr;
  if (move.flags) args->flags = reinterpret_cast<uint32_t*>(mutable_data<int32_t>(*move.flags));
  int used = 0;
  args->params = place_table(move.params, &args->own, &used, temporaries);
}

}  // namespace

int64_t state_nbytes(int64_t numel, int64_t k) { return workspace_nbytes(numel, k); }

void compress(const RuleTensors& rule, const OptionalTensor& aggregate, int64_t k, WireType wire,
              uint32_t tag, const Tensor& payload, const OptionalTensor& state) {
  const Place place(rule.memory);
  Temporaries temporaries{place, {}};
  const int64_t numel = rule.memory.numel();
  const int64_t nbytes = state ? state->numel() : workspace_nbytes(numel, k);
  void* const workspace = state ? bytes_of(*state, "state") : temporaries(nbytes);
  CompressArgs args = {};
  fill_rule(rule, &temporaries, &args.rule);
  args.aggregate = aggregate_of(aggregate);
  args.k = k;
  args.wire = wire;
  args.tag = tag;
  args.payload = bytes_of(payload, "payload");
  args.workspace = make_workspace(workspace, nbytes, numel);
  args.fresh = !state;
  check_cuda(compress_launch(args, place.stream));
}

int64_t repairs(const Tensor& state) {
  const Place place(state);
  int64_t count = 0;
  check_cuda(cudaMemcpyAsync(&count, data<uint8_t>(state) + offsetof(Control, guess.repairs),
                             sizeof(count), cudaMemcpyDeviceToHost, place.stream));
  check_cuda(cudaStreamSynchronize(place.stream));
  return count;
}

void accumulate(const RuleTensors& rule, const OptionalTensor& aggregate, int64_t rank,
                int64_t ranks, const Tensor& total) {
  const Place place(rule.memory);
  Temporaries temporaries{place, {}};
  AccumulateArgs args = {};
  fill_rule(rule, &temporaries, &args.rule);
  args.aggregate = aggregate ? data<float>(*aggregate) : nullptr;
  args.total = mutable_data<float>(total);
  args.rank = rank;
  args.ranks = ranks;
  check_cuda(accumulate_launch(args, place.stream));
}

void apply_dense(const MoveTensors& move, const Tensor& memory, const Tensor& total,
                 int64_t ranks) {
  const Place place(memory);
  Temporaries temporaries{place, {}};
  ApplyDenseArgs args = {};
  args.memory = mutable_data<float>(memory);
  args.total = mutable_data<float>(total);
  args.numel = memory.numel();
  args.factor = mean_factor(ranks);
  fill_move(move, &temporaries, &args.move);
  check_cuda(apply_dense_launch(args, place.stream));
}

void unpack(const PayloadTensor& payload, const Tensor& indices, const Tensor& values,
            const Tensor& nonfinite) {
  const Place place(payload.bytes);
  // A damaged payload raises on the CPU; here its damaged tiles keep index -1 and value 0.
  check_cuda(
      cudaMemsetAsync(mutable_data<int64_t>(indices), 0xff, 8 * payload.shape.k, place.stream));
  check_cuda(cudaMemsetAsync(mutable_data<float>(values), 0, 4 * payload.shape.k, place.stream));
  check_cuda(unpack_launch(payload_of(payload, "payload"), mutable_data<int64_t>(indices),
                           mutable_data<float>(values), mutable_data<int64_t>(nonfinite),
                           place.stream));
}

void verdict(const TensorList& payloads, const TensorList& counts, const Tensor& flags) {
  const Place place(flags);
  std::vector<Gathered> buckets;
  for (const Tensor& payload : payloads) buckets.push_back(gathered_of(payload));
  for (const Tensor& count : counts)
    buckets.push_back({reinterpret_cast<const uint8_t*>(data<float>(count)), count.numel() / 2, 0});
  check_cuda(verdict_launch(buckets.data(), static_cast<int>(buckets.size()),
                            reinterpret_cast<uint32_t*>(mutable_data<int32_t>(flags)),
                            place.stream));
}

void payload_nonfinite(const Tensor& payloads, const Tensor& nonfinite) {
  const Place place(payloads);
  check_cuda(payload_nonfinite_launch(gathered_of(payloads), mutable_data<int64_t>(nonfinite),
                                      place.stream));
}

void aggregate_flags(const TensorList& aggregates, const Tensor& flags) {
  const Place place(flags);
  std::vector<const uint8_t*> pointers;
  for (const Tensor& aggregate : aggregates) pointers.push_back(bytes_of(aggregate, "aggregates"));
  check_cuda(aggregate_flags_launch(pointers.data(), static_cast<int>(pointers.size()),
                                    mutable_data<int32_t>(flags), place.stream));
}

void fingerprint(const std::vector<Segment>& params, const Tensor& prints) {
  const Place place(prints);
  auto* print = reinterpret_cast<unsigned long long*>(mutable_data<int64_t>(prints));
  for (const Segment& param : params)
    check_cuda(fingerprint_launch(param.data, param.dtype, param.numel, print++, place.stream));
}

void merge(const PayloadTensor& payloads, int64_t ranks, const OptionalTensor& skip,
           const Tensor& aggregate) {
  const Place place(aggregate);
  check_cuda(merge_launch(payload_of(payloads, "payloads"), ranks, skip_of(skip),
                          bytes_of(aggregate, "aggregate"), place.stream));
}

void apply(const MoveTensors& move, const Tensor& aggregate, int64_t numel,
           const OptionalTensor& memory, const std::optional<PayloadTensor>& own) {
  const Place place(aggregate);
  Temporaries temporaries{place, {}};
  ApplyArgs args = {};
  args.aggregate = aggregate_of(aggregate);
  args.numel = numel;
  fill_move(move, &temporaries, &args.move);
  if (memory) {
    args.memory = mutable_data<float>(*memory);
    args.payload = payload_of(*own, "payload");
  }
  check_cuda(apply_launch(args, place.stream));
}

void restore(const Tensor& memory, const PayloadTensor& payload, const OptionalTensor& skip) {
  const Place place(memory);
  check_cuda(restore_launch(mutable_data<float>(memory), payload_of(payload, "payload"),
                            skip_of(skip), place.stream));
}

void mask(const Tensor& momentum_buffer, const PayloadTensor& payload, const OptionalTensor& skip) {
  const Place place(momentum_buffer);
  check_cuda(mask_launch(mutable_data<float>(momentum_buffer), payload_of(payload, "payload"),
                         skip_of(skip), place.stream));
}

void sparsify(const Tensor& dense, const Tensor& aggregate) {
  const Place place(dense);
  check_cuda(sparsify_launch(data<float>(dense), dense.numel(), bytes_of(aggregate, "aggregate"),
                             place.stream));
}

void densify(const Tensor& aggregate, const Tensor& dense) {
  const Place place(dense);
  check_cuda(densify_launch(aggregate_of(aggregate), dense.numel(), mutable_data<float>(dense),
                            place.stream));
}

}  // namespace gmc::cuda
