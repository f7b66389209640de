#include "sample.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "segments.h"

namespace gmc::cpu {
namespace {

// Reads runs of a bucket's elements in ascending order; zeros where there is no tensor.
class Reader {
 public:
  explicit Reader(const std::vector<Segment>& segments) : segments_(segments) {}

  void read(int64_t begin, int64_t n, float* out) {
    while (segments_[first_].begin + segments_[first_].numel <= begin) ++first_;
    for_each_piece(segments_, &first_, begin, begin + n,
                   [=](const Segment& segment, int64_t from, int64_t at, int64_t length) {
                     if (!segment.data) return std::fill_n(out + at, length, 0.0f), void();
                     with_dtype(segment.dtype, [=](auto format) {
                       for (int64_t i = 0; i < length; ++i)
                         out[at + i] = load_as<decltype(format)>(segment.data, from + i);
                     });
                   });
  }

 private:
  const std::vector<Segment>& segments_;
  size_t first_ = 0;
};

}  // namespace

SampledValues::SampledValues(const RuleCall& call, const Sample& sample) : keys_(sample.size) {
  Reader grads(call.grads), params(call.params);
  const bool decays = !call.params.empty(), overflowed = call.found_inf.load() != 0.0f;
  const float factor = gradient_factor(call.grad_scale.load(), call.options);
  const float momentum = call.momentum.load();
  float g[kRun] = {}, w[kRun] = {};
  uint32_t ignored = 0;
  for (int64_t run = 0; run < sample.runs; ++run) {
    const int64_t begin = sample.place(static_cast<uint32_t>(run)),
                  n = std::min(kRun, call.numel - begin);
    if (!overflowed) grads.read(begin, n, g);
    if (decays) params.read(begin, n, w);
    const float* u = call.memory + begin;
    uint32_t* key = keys_.data() + run * kRun;
    for (int64_t i = 0; i < n; ++i) {
      const float scaled = overflowed ? 0.0f : scaled_gradient(g[i], factor, &ignored);
      gradient_ += std::fabs(scaled);
      const float v = call.momentum_buffer
                          ? sampled_value(u[i], scaled, w[i], call.momentum_buffer[begin + i],
                                          momentum, call.options)
                          : sampled_value(u[i], scaled, w[i], call.options);
      key[i] = magnitude_key(finite_or_zero(v));
    }
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
