// The CUDA kernels, from tensors: pointers taken, temporaries allocated by torch's caching
// allocator, launched on the current stream of the tensors' device. Arguments were checked by
// ops.cpp. Nothing here waits for the device.
#pragma once

#include <optional>
#include <vector>

#include "arguments.h"

namespace gmc::cuda {

int64_t state_nbytes(int64_t numel, int64_t k);
void compress(const RuleTensors& rule, const OptionalTensor& aggregate, int64_t k, WireType wire,
              uint32_t tag, const Tensor& payload, const OptionalTensor& state);
int64_t repairs(const Tensor& state);  // waits for the device
void accumulate(const RuleTensors& rule, const OptionalTensor& aggregate, int64_t rank,
                int64_t ranks, const Tensor& total);
void apply_dense(const MoveTensors& move, const Tensor& memory, const Tensor& total, int64_t ranks);

void unpack(const PayloadTensor& payload, const Tensor& indices, const Tensor& values,
            const Tensor& nonfinite);
void verdict(const TensorList& payloads, const TensorList& counts, const Tensor& flags);
void payload_nonfinite(const Tensor& payloads, const Tensor& nonfinite);
void aggregate_flags(const TensorList& aggregates, const Tensor& flags);
void fingerprint(const std::vector<Segment>& params, const Tensor& prints);
void merge(const PayloadTensor& payloads, int64_t ranks, const OptionalTensor& skip,
           const Tensor& aggregate);
// memory with own: as in ApplyArgs.
void apply(const MoveTensors& move, const Tensor& aggregate, int64_t numel,
           const OptionalTensor& memory, const std::optional<PayloadTensor>& own);
void restore(const Tensor& memory, const PayloadTensor& payload, const OptionalTensor& skip);
void mask(const Tensor& momentum_buffer, const PayloadTensor& payload, const OptionalTensor& skip);
void sparsify(const Tensor& dense, const Tensor& aggregate);
void densify(const Tensor& aggregate, const Tensor& dense);

}  // namespace gmc::cuda
