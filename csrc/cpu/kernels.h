// The CPU kernels: plain structs of pointers and sizes in, no tensors. Arguments were checked by
// ops.cpp; bytes that came over a wire were not, and are checked here.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "../bucket.h"

namespace gmc::cpu {

// A payload whose header, offsets, indices or values contradict each other.
struct DamagedPayload : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What the rule (rule.h) reads and updates.
struct RuleArgs {
  float* memory;
  float* momentum_buffer;  // nullptr: global momentum
  std::vector<Segment> grads;
  std::vector<Segment> params;  // empty without weight decay
  int64_t numel;
  float momentum;
  float weight_decay;
  float memory_decay;
  float grad_factor;  // 1 / grad_scale, negated to maximize
  bool nesterov;
  bool found_inf;  // counts the whole gradient as zero
};

struct CompressArgs {
  RuleArgs rule;
  const uint8_t* aggregate;  // nullptr: no global momentum
  int64_t k;
  WireType wire;
  uint32_t tag;
  uint8_t* payload;
  uint8_t* state;  // kStateBytes, or nullptr: start without a guess
};

constexpr int64_t kStateBytes = 64;

void compress(const CompressArgs& args);
int64_t state_repairs(const uint8_t* state);

// A dense bucket, before the sum over all ranks: memory = v, and total [numel + ranks] = v and, at
// place numel + rank, the count of non-finite values.
struct AccumulateArgs {
  RuleArgs rule;
  const float* aggregate;  // [numel]; nullptr: no global momentum
  float* total;
  int64_t rank, ranks;
};

void accumulate(const AccumulateArgs& args);

// The same bucket, after the sum: total becomes the mean, the parameters move, memory is zero. Or,
// when the step is skipped: total = 0.
struct ApplyDenseArgs {
  std::vector<Segment> params;
  float* memory;
  float* total;
  int64_t numel, ranks;
  float lr;
  bool skip;
};

void apply_dense(const ApplyDenseArgs& args);

void unpack(const Payload& payload, int64_t* indices, float* values, int64_t* nonfinite);
// The verdict over one bucket: from the headers of its payloads, or of a dense one from each rank's
// count of non-finite values and then each rank's tag.
uint32_t verdict(const uint8_t* payloads, int64_t ranks, int64_t nbytes);
uint32_t verdict(const float* counts, int64_t ranks);
// nonfinite[rank] = the count in each header.
void payload_nonfinite(const uint8_t* payloads, int64_t ranks, int64_t nbytes, int64_t* nonfinite);
void fingerprint(const std::vector<Segment>& params, int64_t numel, uint64_t* prints);
void merge(const Payload& payloads, int64_t ranks, bool skip, uint8_t* aggregate);
void apply(const std::vector<Segment>& params, const uint8_t* aggregate, int64_t numel, float lr);
void restore(float* memory, const Payload& payload);
void mask(float* momentum_buffer, const Payload& payload);
void sparsify(const float* dense, int64_t numel, uint8_t* aggregate);
void densify(const uint8_t* aggregate, int64_t numel, float* dense);

}  // namespace gmc::cpu
