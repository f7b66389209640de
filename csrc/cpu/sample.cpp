#include "sample.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "segments.h"

namespace gmc::cpu {
namespace {

// Element i, where i never falls; zero where there is no tensor.
class Reader {
 public:
  explicit Reader(const std::vector<Segment>& segments) : segments_(segments) {}

  float at(int64_t i) {
    while (segments_[number_].begin + segments_[number_].numel <= i) ++number_;
    const Segment& segment = segments_[number_];
    return segment.data ? load_value(segment.data, segment.dtype, i - segment.begin) : 0.0f;
  }

 private:
  const std::vector<Segment>& segments_;
  size_t number_ = 0;
};

}  // namespace

SampledValues::SampledValues(const RuleArgs& args, const Sample& sample) : keys_(sample.size) {
  Reader grads(args.grads), params(args.params);
  const bool decays = !args.params.empty();
  uint32_t ignored = 0;
  for (int64_t n = 0; n < sample.size; ++n) {
    const int64_t i = sample.place(n);
    const float g =
        args.found_inf ? 0.0f : scaled_gradient(grads.at(i), args.grad_factor, &ignored);
    gradient_ += std::fabs(g);
    const float w = decays ? params.at(i) : 0.0f, u = args.memory[i];
    const float decay = decays ? args.weight_decay : 0.0f;
    const float v = args.momentum_buffer ? sampled_value(u, g, decay, w, args.momentum_buffer[i],
                                                         args.momentum, args.nesterov)
                                         : sampled_value(u, g, decay, w);
    keys_[n] = magnitude_key(finite_or_zero(v));
  }
}

float SampledValues::reaching(uint32_t key) const {
  return static_cast<float>(
      std::count_if(keys_.begin(), keys_.end(), [=](uint32_t other) { return other >= key; }));
}

uint32_t SampledValues::at(float count) const {
  const auto n = static_cast<size_t>(count);
  if (n >= keys_.size()) return 0;
  std::nth_element(keys_.begin(), keys_.begin() + n, keys_.end(), std::greater<uint32_t>());
  return keys_[n];
}

}  // namespace gmc::cpu
