#include "cuda/tensors.h"

#include <ATen/Functions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <string>

#include "cuda/compress.h"
#include "cuda/kernels.h"

namespace gmc::cuda {
namespace {

// The tensor's device is current as long as this lives.
struct Place {
  explicit Place(const at::Tensor& tensor)
      : guard(tensor.device()), stream(c10::cuda::getCurrentCUDAStream().stream()) {}

  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;
};

// Opaque bytes are read 16 at a time at most; fresh tensors are aligned to far more.
uint8_t* bytes_of(const at::Tensor& tensor, const char* name) {
  auto* data = static_cast<uint8_t*>(tensor.data_ptr());
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(data) % 16 == 0, name,
                    ": got a view that begins at byte ", tensor.storage_offset(),
                    " of its storage, must begin at a multiple of 16");
  return data;
}

Scalar scalar_of(const at::Tensor& tensor, const char* name) {
  if (tensor.device().is_cpu()) return scalar(static_cast<float>(tensor.item<double>()));
  const auto at = [&](ScalarType type) { return Scalar{tensor.const_data_ptr(), type, 0.0f}; };
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return at(ScalarType::kFloat32);
    case at::kBFloat16:
      return at(ScalarType::kBFloat16);
    case at::kHalf:
      return at(ScalarType::kFloat16);
    case at::kDouble:
      return at(ScalarType::kFloat64);
    default:
      TORCH_CHECK_TYPE(false, name, ": got ", tensor.scalar_type(),
                       ", must be torch.float32, bfloat16, float16 or float64");
  }
}

const int32_t* skip_of(const OptionalTensor& skip) {
  return skip ? skip->const_data_ptr<int32_t>() : nullptr;
}

Payload payload_of(const PayloadTensor& payload, const char* name) {
  return {bytes_of(payload.bytes, name), payload.numel, payload.k, payload.wire};
}

Aggregate aggregate_of(const OptionalTensor& aggregate) {
  if (!aggregate) return {nullptr, 0};
  return {bytes_of(*aggregate, "aggregate"), aggregate->numel()};
}

// The table that kernels search: without empty tensors, and with neighbours in one run joined (a
// flat buffer's views, or several Nones).
std::vector<Segment> table_of(const std::vector<cpu::Segment>& segments) {
  std::vector<Segment> table;
  for (const cpu::Segment& segment : segments) {
    if (segment.numel == 0) continue;
    const auto begin = static_cast<uint32_t>(segment.begin);
    if (!table.empty() && table.back().dtype == segment.dtype) {
      const Segment& last = table.back();
      const auto* end =
          static_cast<const char*>(last.data) + (begin - last.begin) * element_size(last.dtype);
      if (last.data ? end == segment.data : !segment.data) continue;
    }
    table.push_back({segment.data, begin, segment.dtype});
  }
  return table;
}

// Puts a table into the kernel's own parameters from place *used on, or, if it is too long for
// that, into `stored`, which must outlive the launches.
SegmentList place_table(const std::vector<Segment>& table, SegmentPiece* own, int* used,
                        at::Tensor* stored, const at::TensorOptions& options, cudaStream_t stream) {
  const int count = static_cast<int>(table.size());
  if (*used + count <= kInlineSegments) {
    std::copy(table.begin(), table.end(), own->segment + *used);
    const SegmentList list{nullptr, *used, count};
    *used += count;
    return list;
  }
  *stored = at::empty({count * static_cast<int64_t>(sizeof(Segment))}, options.dtype(at::kByte));
  auto* data = static_cast<Segment*>(stored->data_ptr());
  C10_CUDA_CHECK(store_segments_launch(table.data(), count, data, stream));
  return {data, 0, count};
}

}  // namespace

int64_t state_nbytes(int64_t numel, int64_t k) { return workspace_nbytes(numel, k); }

void compress(const CompressTensors& tensors) {
  const Place place(tensors.memory);
  const int64_t numel = tensors.memory.numel(), k = tensors.k;
  const auto options = tensors.memory.options();

  at::Tensor state;
  if (tensors.state) {
    state = *tensors.state;
  } else {
    state = at::empty({workspace_nbytes(numel, k)}, options.dtype(at::kByte));
    C10_CUDA_CHECK(cudaMemsetAsync(state.data_ptr(), 0, kZeroBytes, place.stream));
  }
  CompressArgs args = {};
  args.memory = tensors.memory.mutable_data_ptr<float>();
  if (tensors.momentum_buffer)
    args.momentum_buffer = tensors.momentum_buffer->mutable_data_ptr<float>();
  at::Tensor stored_grads, stored_params;
  int used = 0;
  args.grads =
      place_table(table_of(tensors.grads), &args.own, &used, &stored_grads, options, place.stream);
  args.params = place_table(table_of(tensors.params), &args.own, &used, &stored_params, options,
                            place.stream);
  args.numel = numel;
  args.k = k;
  args.momentum = scalar_of(tensors.momentum, "momentum");
  args.grad_scale =
      tensors.grad_scale ? scalar_of(*tensors.grad_scale, "grad_scale") : scalar(1.0f);
  args.found_inf = tensors.found_inf ? scalar_of(*tensors.found_inf, "found_inf") : scalar(0.0f);
  args.weight_decay = tensors.weight_decay;
  args.maximize = tensors.maximize;
  args.nesterov = tensors.nesterov;
  args.aggregate = aggregate_of(tensors.aggregate);
  args.wire = tensors.wire;
  args.payload = bytes_of(tensors.payload, "payload");
  args.workspace = make_workspace(bytes_of(state, "state"), numel, k);
  C10_CUDA_CHECK(compress_launch(args, place.stream));
}

int64_t repairs(const at::Tensor& state) {
  return state.narrow(0, offsetof(Control, repairs), 8).view(at::kLong).item<int64_t>();
}

void unpack(const PayloadTensor& payload, const at::Tensor& indices, const at::Tensor& values,
            const at::Tensor& nonfinite) {
  const Place place(payload.bytes);
  C10_CUDA_CHECK(unpack_launch(payload_of(payload, "payload"), indices.mutable_data_ptr<int64_t>(),
                               values.mutable_data_ptr<float>(),
                               nonfinite.mutable_data_ptr<int64_t>(), place.stream));
}

void verdict(at::TensorList payloads, const at::Tensor& flags) {
  const Place place(flags);
  std::vector<Gathered> buckets;
  for (const at::Tensor& payload : payloads)
    buckets.push_back({payload.const_data_ptr<uint8_t>(), payload.size(0), payload.size(1)});
  C10_CUDA_CHECK(verdict_launch(buckets.data(), static_cast<int>(buckets.size()),
                                reinterpret_cast<uint32_t*>(flags.mutable_data_ptr<int32_t>()),
                                place.stream));
}

void merge(const PayloadTensor& payloads, int64_t ranks, const OptionalTensor& skip,
           const at::Tensor& aggregate) {
  const Place place(aggregate);
  C10_CUDA_CHECK(merge_launch(payload_of(payloads, "payloads"), ranks, skip_of(skip),
                              bytes_of(aggregate, "aggregate"), place.stream));
}

void apply(const std::vector<cpu::Segment>& params, const at::Tensor& aggregate, int64_t numel,
           const at::Tensor& lr, const OptionalTensor& skip) {
  const Place place(aggregate);
  ApplyArgs args = {};
  args.aggregate = aggregate_of(aggregate);
  args.numel = numel;
  args.lr = scalar_of(lr, "lr");
  args.skip = skip_of(skip);
  at::Tensor stored;
  int used = 0;
  args.params =
      place_table(table_of(params), &args.own, &used, &stored, aggregate.options(), place.stream);
  C10_CUDA_CHECK(apply_launch(args, place.stream));
}

void restore(const at::Tensor& memory, const PayloadTensor& payload, const OptionalTensor& skip) {
  const Place place(memory);
  C10_CUDA_CHECK(restore_launch(memory.mutable_data_ptr<float>(), payload_of(payload, "payload"),
                                skip_of(skip), place.stream));
}

void mask(const at::Tensor& momentum_buffer, const PayloadTensor& payload,
          const OptionalTensor& skip) {
  const Place place(momentum_buffer);
  C10_CUDA_CHECK(mask_launch(momentum_buffer.mutable_data_ptr<float>(),
                             payload_of(payload, "payload"), skip_of(skip), place.stream));
}

void sparsify(const at::Tensor& dense, const at::Tensor& aggregate) {
  const Place place(dense);
  C10_CUDA_CHECK(sparsify_launch(dense.const_data_ptr<float>(), dense.numel(),
                                 bytes_of(aggregate, "aggregate"), place.stream));
}

void densify(const at::Tensor& aggregate, const at::Tensor& dense) {
  const Place place(dense);
  C10_CUDA_CHECK(densify_launch(aggregate_of(aggregate), dense.numel(),
                                dense.mutable_data_ptr<float>(), place.stream));
}

}  // namespace gmc::cuda
