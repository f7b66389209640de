// A sample of v before the pass (guess.h), as magnitudes.
#pragma once

#include <vector>

#include "shared/calls.h"
#include "shared/guess.h"

namespace gmc::cpu {

class SampledValues {
 public:
  SampledValues(const RuleCall& call, const Sample& sample);

  float reaching(uint32_t key) const;
  uint32_t at(float count) const;
  float gradient() const { return gradient_; }

 private:
  mutable std::vector<uint32_t> keys_;  // at() moves the largest to the front
  float gradient_ = 0.0f;
};

}  // namespace gmc::cpu
