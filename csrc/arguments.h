// What several operators take, after its checks and still as tensors.
#pragma once

#include <vector>

#include "bucket.h"
#include "tensor.h"

namespace gmc {

// What the rule (rule.h) reads and updates.
struct RuleTensors {
  Tensor memory;
  OptionalTensor momentum_buffer;  // none: global momentum
  std::vector<Segment> grads;
  std::vector<Segment> params;  // empty without weight decay
  Tensor momentum;
  OptionalTensor grad_scale, found_inf;
  float weight_decay, memory_decay;
  bool maximize, nesterov;
};

// How parameters move.
struct MoveTensors {
  std::vector<Segment> params;
  Tensor lr;
  OptionalTensor skip, skipped_steps, flags;
};

// One rank's payload, or those of several ranks.
struct PayloadTensor {
  Tensor bytes;
  PayloadShape shape;
};

}  // namespace gmc
