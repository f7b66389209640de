// What each operator works on, and the functions of both backends that do the work. Arguments were
// checked in torch/. Bytes that came over a wire were not, so each backend checks them itself.
//
// A function of the CPU returns when the work is done, and throws DamagedPayload. A function of
// CUDA returns when the work is on the stream, and throws CudaError.
#pragma once

#include <vector>

#include "shared/bucket.h"
#include "shared/rule.h"

namespace gmc {

// What the rule (rule.h) reads and updates.
struct RuleCall {
  float* memory;
  float* momentum_buffer;  // nullptr: global momentum
  std::vector<Segment> grads;
  std::vector<Segment> params;  // empty without weight decay
  int64_t numel;
  Scalar momentum, grad_scale;
  Scalar found_inf;  // not zero: the whole gradient counts as zero
  RuleOptions options;
};

// aggregate: only for a bucket that is not cut into ranges. Each header gets the count of the whole
// bucket's non-finite values.
struct CompressCall {
  RuleCall rule;
  Aggregate aggregate;
  Ranges ranges;
  uint32_t tag;
  uint8_t* payloads;
  uint8_t* states;       // one for each range; nullptr: nothing is known yet
  int64_t state_nbytes;  // of one
};

// A dense bucket, before the sum over all ranks: memory = v, and total [numel + ranks] = v and, at
// place numel + rank, the count of non-finite values.
struct AccumulateCall {
  RuleCall rule;
  const float* aggregate;  // [numel]; nullptr: there is none
  float* total;
  int64_t rank, ranks;
};

// Whether a step is skipped, and what it leaves behind.
struct Skip {
  const int32_t* verdict;  // nullptr, or not zero: the step is skipped
  int64_t* skipped_steps;  // nullptr, or their count
  uint32_t* flags;         // nullptr, or kKept of the verdict and of damage is added

  GMC_HD bool skipped() const { return verdict && *verdict != 0; }

  // To be called once in a step. damage: kDamaged where a payload was damaged after its header,
  // which the verdict does not know of.
  GMC_HD void leave_behind(uint32_t damage) const {
    const uint32_t word = verdict ? static_cast<uint32_t>(*verdict) : 0;
    if (word != 0 && skipped_steps) ++*skipped_steps;
    if (flags) *flags |= (word | damage) & kKept;
  }
};

// How parameters move.
struct MoveCall {
  std::vector<Segment> params;
  Scalar lr;
  Skip skip;
};

// A dense bucket, after the sum: total becomes the mean, the parameters move, memory becomes zero.
// When the step is skipped, total becomes zero instead.
struct ApplyDenseCall {
  MoveCall move;
  float* memory;
  float* total;
  int64_t numel, ranks;
};

struct UnpackCall {
  Payload payload;
  int64_t* indices;
  float* values;
  int64_t* nonfinite;
};

struct VerdictCall {
  std::vector<Gathered> buckets;
  uint32_t* flags;
};

// aggregate: AggregateLayout(numel, aggregate_capacity(numel, k, ranks)).
struct MergeCall {
  Payload payloads;
  int64_t ranks;
  Skip skip;
  uint8_t* aggregate;
};

// Payloads of the ranges that make up a bucket; nothing is summed. aggregate:
// AggregateLayout(numel, ranges.entries()).
struct MergeRangesCall {
  const uint8_t* payloads;
  Ranges ranges;
  Skip skip;
  uint8_t* aggregate;
};

// memory: where a skipped step gives `payload` back to; nullptr: it does not.
struct ApplyCall {
  MoveCall move;
  Aggregate aggregate;
  int64_t numel;
  float* memory;
  Payload payload;
};

// Acts in skipped steps, or always where there is no verdict. On CUDA, a tile whose entries
// contradict each other is left alone.
struct RestoreCall {
  float* memory;
  const uint8_t* payloads;
  Ranges ranges;
  Skip skip;
  bool by_range;  // whether each range has a verdict of its own, one after the other
};

// Does not act in skipped steps. On CUDA, a tile whose entries contradict each other is left alone.
struct MaskCall {
  float* momentum_buffer;
  const uint8_t* payloads;
  Ranges ranges;
  Skip skip;
};

// aggregate: AggregateLayout(numel, numel).
struct SparsifyCall {
  const float* dense;
  int64_t numel;
  uint8_t* aggregate;
};

struct DensifyCall {
  Aggregate aggregate;
  int64_t numel;
  float* dense;
};

namespace cpu {

int64_t state_nbytes(int64_t numel, int64_t k);

void run(const CompressCall& call);
void run(const AccumulateCall& call);
void run(const ApplyDenseCall& call);
void run(const UnpackCall& call);
void run(const VerdictCall& call);
void run(const MergeCall& call);
void run(const MergeRangesCall& call);
void run(const ApplyCall& call);
void run(const RestoreCall& call);
void run(const MaskCall& call);
void run(const SparsifyCall& call);
void run(const DensifyCall& call);

}  // namespace cpu

namespace cuda {

struct Stream;  // stream.h

int64_t state_nbytes(int64_t numel, int64_t k);

void run(const CompressCall& call, const Stream& stream);
void run(const AccumulateCall& call, const Stream& stream);
void run(const ApplyDenseCall& call, const Stream& stream);
void run(const UnpackCall& call, const Stream& stream);
void run(const VerdictCall& call, const Stream& stream);
void run(const MergeCall& call, const Stream& stream);
void run(const MergeRangesCall& call, const Stream& stream);
void run(const ApplyCall& call, const Stream& stream);
void run(const RestoreCall& call, const Stream& stream);
void run(const MaskCall& call, const Stream& stream);
void run(const SparsifyCall& call, const Stream& stream);
void run(const DensifyCall& call, const Stream& stream);

}  // namespace cuda

}  // namespace gmc
