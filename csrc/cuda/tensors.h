// The CUDA kernels, from tensors: pointers taken, temporaries allocated by torch's caching
// allocator, launched on the current stream of the tensors' device. Arguments were checked by
// ops.cpp. Nothing here waits for the device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "cpu/kernels.h"

namespace gmc::cuda {

using OptionalTensor = std::optional<at::Tensor>;

struct CompressTensors {
  at::Tensor memory;
  OptionalTensor momentum_buffer;
  std::vector<cpu::Segment> grads;
  std::vector<cpu::Segment> params;  // empty without weight decay
  int64_t k;
  at::Tensor momentum;
  OptionalTensor grad_scale, found_inf;
  float weight_decay;
  bool maximize, nesterov;
  OptionalTensor aggregate;
  DType wire;
  at::Tensor payload;
  OptionalTensor state;
};

int64_t state_nbytes(int64_t numel, int64_t k);
void compress(const CompressTensors& tensors);
int64_t repairs(const at::Tensor& state);  // waits for the device

struct PayloadTensor {
  at::Tensor bytes;
  int64_t numel, k;
  DType wire;
};

void unpack(const PayloadTensor& payload, const at::Tensor& indices, const at::Tensor& values,
            const at::Tensor& nonfinite);
void verdict(at::TensorList payloads, const at::Tensor& flags);
void merge(const PayloadTensor& payloads, int64_t ranks, const OptionalTensor& skip,
           const at::Tensor& aggregate);
void apply(const std::vector<cpu::Segment>& params, const at::Tensor& aggregate, int64_t numel,
           const at::Tensor& lr, const OptionalTensor& skip);
void restore(const at::Tensor& memory, const PayloadTensor& payload, const OptionalTensor& skip);
void mask(const at::Tensor& momentum_buffer, const PayloadTensor& payload,
          const OptionalTensor& skip);
void sparsify(const at::Tensor& dense, const at::Tensor& aggregate);
void densify(const at::Tensor& aggregate, const at::Tensor& dense);

}  // namespace gmc::cuda
