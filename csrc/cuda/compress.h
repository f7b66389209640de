// compress, from plain pointers: what it takes and the launches it is made of.
#pragma once

#include "aggregate.cuh"
#include "scalar.h"
#include "segments.h"
#include "workspace.h"

namespace gmc::cuda {

struct CompressArgs {
  float* memory;
  float* momentum_buffer;  // nullptr: global momentum
  SegmentList grads;
  SegmentList params;  // count == 0 without weight decay
  int64_t numel, k;
  Scalar momentum;
  Scalar grad_scale;
  Scalar found_inf;  // non-zero counts the whole gradient as zero
  float weight_decay;
  bool maximize, nesterov;
  Aggregate aggregate;
  DType wire;
  uint8_t* payload;
  Workspace workspace;
  SegmentPiece own;  // segments that are not stored
};
static_assert(sizeof(CompressArgs) <= 4096, "the limit for kernel parameters on older drivers");

// What the selection needs of them.
struct SelectArgs {
  float* memory;
  int64_t numel, k;
  Scalar found_inf;
  DType wire;
  uint8_t* payload;
  Workspace workspace;
};

// All of compress. The workspace must be zero or as the last call left it.
cudaError_t compress_launch(const CompressArgs& args, cudaStream_t stream);

// Its parts, in order.
cudaError_t pass_launch(const CompressArgs& args, cudaStream_t stream);
cudaError_t repair_launch(const SelectArgs& args, cudaStream_t stream);
cudaError_t select_launch(const SelectArgs& args, cudaStream_t stream);

}  // namespace gmc::cuda
