// The launchers besides compress: plain pointers and sizes in, no tensors. Arguments were checked
// by ops.cpp; bytes that came over a wire were not, and are checked by the kernels.
#pragma once

#include "aggregate.cuh"
#include "bucket.h"
#include "rule_args.h"

namespace gmc::cuda {

// One bucket's gathered payloads.
struct Gathered {
  const uint8_t* data;
  int64_t ranks, nbytes;  // of one payload
};

// flags = the verdict over all buckets; of those sent whole (nbytes is 0) data is a float for each
// rank, its count of non-finite values, then a float for each rank, its tag.
cudaError_t verdict_launch(const Gathered* buckets, int count, uint32_t* flags,
                           cudaStream_t stream);
// nonfinite[rank] = the count in each header.
cudaError_t payload_nonfinite_launch(const Gathered& payloads, int64_t* nonfinite,
                                     cudaStream_t stream);
// flags[i] = those in the header of aggregate i.
cudaError_t aggregate_flags_launch(const uint8_t* const* aggregates, int count, int32_t* flags,
                                   cudaStream_t stream);

// *print = the sum of one tensor's terms (fingerprint.h).
cudaError_t fingerprint_launch(const void* data, DType dtype, int64_t numel,
                               unsigned long long* print, cudaStream_t stream);

// payloads: those of `ranks` ranks. skip: nullptr, or a number that is not zero for a step that is
// skipped. aggregate: AggregateLayout(numel, aggregate_capacity(numel, k, ranks)).
cudaError_t merge_launch(const Payload& payloads, int64_t ranks, const int32_t* skip,
                         uint8_t* aggregate, cudaStream_t stream);

// How the parameters move.
struct MoveArgs {
  Scalar lr;
  const int32_t* skip;     // nullptr, or a number that is not zero for a step that is skipped
  int64_t* skipped_steps;  // nullptr, or their count
  uint32_t* flags;         // nullptr, or kKept of the verdict and of damage is added
  SegmentList params;
  SegmentPiece own;  // segments that are not stored

  GMC_HD bool skipped() const { return skip && *skip != 0; }
  // For one thread of all to call: what a step leaves behind. damage: kDamaged where a payload was
  // damaged behind its header, which the verdict does not know of.
  GMC_HD void leave_behind(uint32_t damage) const {
    const uint32_t verdict = skip ? static_cast<uint32_t>(*skip) : 0;
    if (verdict != 0 && skipped_steps) ++*skipped_steps;
    if (flags) *flags |= (verdict | damage) & kKept;
  }
};

struct ApplyArgs {
  Aggregate aggregate;
  int64_t numel;
  MoveArgs move;
  // What a skipped step gives back, and to where. memory is nullptr: nothing.
  float* memory;
  Payload payload;
};
static_assert(sizeof(ApplyArgs) <= 4096, "the limit for kernel parameters on older drivers");

cudaError_t apply_launch(const ApplyArgs& args, cudaStream_t stream);

// A dense bucket, before the sum over all ranks: memory = v, and total [numel + ranks] = v and, at
// place numel + rank, the count of non-finite values.
struct AccumulateArgs {
  RuleArgs rule;
  const float* aggregate;  // [numel]; nullptr: none
  float* total;
  int64_t rank, ranks;
};
static_assert(sizeof(AccumulateArgs) <= 4096, "the limit for kernel parameters on older drivers");

cudaError_t accumulate_launch(const AccumulateArgs& args, cudaStream_t stream);

// The same bucket, after the sum: total becomes the mean, the parameters move, memory is zero. Or,
// when the step is skipped: total = 0.
struct ApplyDenseArgs {
  float* memory;
  float* total;
  int64_t numel;
  float factor;  // 1 / ranks
  MoveArgs move;
};
static_assert(sizeof(ApplyDenseArgs) <= 4096, "the limit for kernel parameters on older drivers");

cudaError_t apply_dense_launch(const ApplyDenseArgs& args, cudaStream_t stream);

// A tile whose entries contradict each other is left alone: no exception can come from here.
cudaError_t restore_launch(float* memory, const Payload& payload, const int32_t* skip,
                           cudaStream_t stream);
cudaError_t mask_launch(float* momentum_buffer, const Payload& payload, const int32_t* skip,
                        cudaStream_t stream);
cudaError_t unpack_launch(const Payload& payload, int64_t* indices, float* values,
                          int64_t* nonfinite, cudaStream_t stream);

// aggregate: AggregateLayout(numel, numel).
cudaError_t sparsify_launch(const float* dense, int64_t numel, uint8_t* aggregate,
                            cudaStream_t stream);
cudaError_t densify_launch(const Aggregate& aggregate, int64_t numel, float* dense,
                           cudaStream_t stream);

}  // namespace gmc::cuda
