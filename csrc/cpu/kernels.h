// The CPU kernels: plain structs of pointers and sizes in, no tensors. Arguments were checked by
// ops.cpp; bytes that came over a wire were not, and are checked here.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "../payload.h"

namespace gmc::cpu {

// One tensor of a bucket. data == nullptr stands for zeros.
struct Segment {
  void* data;
  int64_t begin, numel;  // place in the bucket's index space
  DType dtype;
};

// A payload whose header, offsets, indices or values contradict each other.
struct DamagedPayload : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct CompressArgs {
  float* memory;
  float* momentum_buffer;  // nullptr: global momentum
  std::vector<Segment> grads;
  std::vector<Segment> params;  // empty without weight decay
  int64_t numel, k;
  float momentum;
  float weight_decay;
  float grad_factor;  // 1 / grad_scale, negated to maximize
  bool nesterov;
  bool found_inf;            // counts the whole gradient as zero
  const uint8_t* aggregate;  // nullptr: no global momentum
  DType wire;
  uint8_t* payload;
  uint8_t* state;  // kStateBytes, or nullptr: start without a guess
};

constexpr int64_t kStateBytes = 64;

void compress(const CompressArgs& args);
int64_t state_repairs(const uint8_t* state);

struct PayloadArgs {
  const uint8_t* data;
  int64_t numel, k;
  DType wire;
};

void unpack(const PayloadArgs& payload, int64_t* indices, float* values, int64_t* nonfinite);
uint32_t verdict(const uint8_t* payloads, int64_t ranks, int64_t nbytes);
void merge(const PayloadArgs& payloads, int64_t ranks, bool skip, uint8_t* aggregate);
void apply(const std::vector<Segment>& params, const uint8_t* aggregate, int64_t numel, float lr);
void restore(float* memory, const PayloadArgs& payload);
void mask(float* momentum_buffer, const PayloadArgs& payload);
void sparsify(const float* dense, int64_t numel, uint8_t* aggregate);
void densify(const uint8_t* aggregate, int64_t numel, float* dense);

}  // namespace gmc::cpu
