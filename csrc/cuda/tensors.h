// The CUDA kernels, from tensors: pointers taken, temporaries allocated by torch's caching
// allocator, launched on the current stream of the tensors' device. Arguments were checked by
// ops.cpp. Nothing here waits for the device.
#pragma once

#include <vector>

#include "cpu/kernels.h"
#include "tensor.h"

namespace gmc::cuda {

struct CompressTensors {
  Tensor memory;
  OptionalTensor momentum_buffer;
  std::vector<cpu::Segment> grads;
  std::vector<cpu::Segment> params;  // empty without weight decay
  int64_t k;
  Tensor momentum;
  OptionalTensor grad_scale, found_inf;
  float weight_decay;
  bool maximize, nesterov;
  OptionalTensor aggregate;
  DType wire;
  Tensor payload;
  OptionalTensor state;
};

int64_t state_nbytes(int64_t numel, int64_t k);
void compress(const CompressTensors& tensors);
int64_t repairs(const Tensor& state);  // waits for the device

struct PayloadTensor {
  Tensor bytes;
  int64_t numel, k;
  DType wire;
};

void unpack(const PayloadTensor& payload, const Tensor& indices, const Tensor& values,
            const Tensor& nonfinite);
void verdict(const TensorList& payloads, const Tensor& flags);
void merge(const PayloadTensor& payloads, int64_t ranks, const OptionalTensor& skip,
           const Tensor& aggregate);
void apply(const std::vector<cpu::Segment>& params, const Tensor& aggregate, int64_t numel,
           const Tensor& lr, const OptionalTensor& skip);
void restore(const Tensor& memory, const PayloadTensor& payload, const OptionalTensor& skip);
void mask(const Tensor& momentum_buffer, const PayloadTensor& payload, const OptionalTensor& skip);
void sparsify(const Tensor& dense, const Tensor& aggregate);
void densify(const Tensor& aggregate, const Tensor& dense);

}  // namespace gmc::cuda
