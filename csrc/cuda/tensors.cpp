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
                        Tensor* stored, const Place& place) {
  const int count = static_cast<int>(table.size());
  if (*used + count <= kInlineSegments) {
    std::copy(table.begin(), table.end(), own->segment + *used);
    const SegmentList list{nullptr, *used, count};
    *used += count;
    return list;
  }
  *stored =
      empty({count * static_cast<int64_t>(sizeof(Segment))}, gmc::ScalarType::Byte, place.device);
  auto* data = mutable_data<Segment>(*stored);
  check_cuda(store_segments_launch(table.data(), count, data, place.stream));
  return {data, 0, count};
}

}  // namespace

int64_t state_nbytes(int64_t numel, int64_t k) { return workspace_nbytes(numel, k); }

void compress(const CompressTensors& tensors) {
  const Place place(tensors.memory);
  const int64_t numel = tensors.memory.numel(), k = tensors.k;

  Tensor state;
  if (tensors.state) {
    state = *tensors.state;
  } else {
    state = empty({workspace_nbytes(numel, k)}, gmc::ScalarType::Byte, place.device);
    check_cuda(cudaMemsetAsync(mutable_data<uint8_t>(state), 0, kZeroBytes, place.stream));
  }
  CompressArgs args = {};
  args.memory = mutable_data<float>(tensors.memory);
  if (tensors.momentum_buffer) args.momentum_buffer = mutable_data<float>(*tensors.momentum_buffer);
  Tensor stored_grads, stored_params;
  int used = 0;
  args.grads = place_table(table_of(tensors.grads), &args.own, &used, &stored_grads, place);
  args.params = place_table(table_of(tensors.params), &args.own, &used, &stored_params, place);
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
  check_cuda(compress_launch(args, place.stream));
}

int64_t repairs(const Tensor& state) {
  const Place place(state);
  int64_t count = 0;
  check_cuda(cudaMemcpyAsync(&count, data<uint8_t>(state) + offsetof(Control, repairs),
                             sizeof(count), cudaMemcpyDeviceToHost, place.stream));
  check_cuda(cudaStreamSynchronize(place.stream));
  return count;
}

void unpack(const PayloadTensor& payload, const Tensor& indices, const Tensor& values,
            const Tensor& nonfinite) {
  const Place place(payload.bytes);
  // A damaged payload raises on the CPU; here its damaged tiles keep index -1 and value 0.
  check_cuda(cudaMemsetAsync(mutable_data<int64_t>(indices), 0xff, 8 * payload.k, place.stream));
  check_cuda(cudaMemsetAsync(mutable_data<float>(values), 0, 4 * payload.k, place.stream));
  check_cuda(unpack_launch(payload_of(payload, "payload"), mutable_data<int64_t>(indices),
                           mutable_data<float>(values), mutable_data<int64_t>(nonfinite),
                           place.stream));
}

void verdict(const TensorList& payloads, const Tensor& flags) {
  const Place place(flags);
  std::vector<Gathered> buckets;
  for (const Tensor& payload : payloads)
    buckets.push_back({data<uint8_t>(payload), payload.size(0), payload.size(1)});
  check_cuda(verdict_launch(buckets.data(), static_cast<int>(buckets.size()),
                            reinterpret_cast<uint32_t*>(mutable_data<int32_t>(flags)),
                            place.stream));
}

void merge(const PayloadTensor& payloads, int64_t ranks, const OptionalTensor& skip,
           const Tensor& aggregate) {
  const Place place(aggregate);
  check_cuda(merge_launch(payload_of(payloads, "payloads"), ranks, skip_of(skip),
                          bytes_of(aggregate, "aggregate"), place.stream));
}

void apply(const std::vector<cpu::Segment>& params, const Tensor& aggregate, int64_t numel,
           const Tensor& lr, const OptionalTensor& skip) {
  const Place place(aggregate);
  ApplyArgs args = {};
  args.aggregate = aggregate_of(aggregate);
  args.numel = numel;
  args.lr = scalar_of(lr, "lr");
  args.skip = skip_of(skip);
  Tensor stored;
  int used = 0;
  args.params = place_table(table_of(params), &args.own, &used, &stored, place);
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
