// What kernels take of the calls that name a bucket's tensors: the tensors as tables (segments.h).
#pragma once

#include "segments.h"
#include "shared/calls.h"

namespace gmc::cuda {

// What the rule reads and updates.
struct RuleArgs {
  float* memory;
  float* momentum_buffer;  // nullptr: global momentum
  SegmentList grads;
  SegmentList params;  // count == 0 without weight decay
  int64_t numel;
  Scalar momentum;
  Scalar grad_scale;
  Scalar found_inf;  // not zero: the whole gradient counts as zero
  RuleOptions options;
  SegmentPiece own;  // segments that are not stored

  RuleArgs(const RuleCall& call, const Stream& stream)
      : memory(call.memory),
        momentum_buffer(call.momentum_buffer),
        numel(call.numel),
        momentum(call.momentum),
        grad_scale(call.grad_scale),
        found_inf(call.found_inf),
        options(call.options),
        own{} {
    int used = 0;
    grads = place_segments(call.grads, &own, &used, stream);
    params = place_segments(call.params, &own, &used, stream);
  }
};

// How the parameters move.
struct MoveArgs {
  Scalar lr;
  Skip skip;
  SegmentList params;
  SegmentPiece own;  // segments that are not stored

  MoveArgs(const MoveCall& call, const Stream& stream) : lr(call.lr), skip(call.skip), own{} {
    int used = 0;
    params = place_segments(call.params, &own, &used, stream);
  }
};

// Kernel parameters take no more than this on older drivers.
constexpr size_t kParameterLimit = 4096;

}  // namespace gmc::cuda
