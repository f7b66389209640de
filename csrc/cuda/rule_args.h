// What the rule reads and updates, in device memory: the part that compress and accumulate share.
#pragma once

#include "scalar.h"
#include "segments.h"

namespace gmc::cuda {

struct RuleArgs {
  float* memory;
  float* momentum_buffer;  // nullptr: global momentum
  SegmentList grads;
  SegmentList params;  // count == 0 without weight decay
  int64_t numel;
  Scalar momentum;
  Scalar grad_scale;
  Scalar found_inf;  // non-zero counts the whole gradient as zero
  float weight_decay, memory_decay;
  bool maximize, nesterov;
  SegmentPiece own;  // segments that are not stored
};

}  // namespace gmc::cuda
