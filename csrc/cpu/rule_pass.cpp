#include "rule_pass.h"

#include <algorithm>

#include "segments.h"

namespace gmc::cpu {
namespace {

constexpr float kZeros[kChunk] = {};

}  // namespace

RulePass::RulePass(const RuleCall& call, LastAggregate aggregate, int64_t begin)
    : call_(call),
      momentum_(call.momentum.load()),
      factor_(gradient_factor(call.grad_scale.load(), call.options)),
      overflowed_(call.found_inf.load() != 0.0f),
      aggregate_(aggregate),
      loops_(loops()),
      next_{find_segment(call.grads, begin), find_segment(call.params, begin), 0} {}

void RulePass::chunk(int64_t begin, int64_t n) {
  float* value = call_.memory + begin;
  uint32_t largest = 0, nonfinite = 0;
  const auto keep_largest = [&](uint32_t key) { largest = std::max(largest, key); };
  if (call_.momentum_buffer) {
    load_gradients(begin, n, &nonfinite);
    add_decay(grad_, begin, n, -0.0f);
    keep_largest(loops_.local_momentum(value, before_, call_.momentum_buffer + begin,
                                       buffer_before_, grad_, momentum_, call_.options, n));
  } else {
    const Places start = next_;
    const auto add_others = [&] {
      keep_largest(add_decay(value, begin, n, 0.0f));
      keep_largest(add_global_momentum(value, begin, n));
    };
    for_each_gradient(begin, n,
                      [&](const void* data, DType dtype, float factor, int64_t at, int64_t length) {
                        keep_largest(loops_.add_gradient(value + at, before_ + at, call_.options,
                                                         data, dtype, factor, length));
                      });
    add_others();
    // Each gradient is looked at only here, where something is not finite.
    if (largest >= kInfKey) {
      std::copy_n(before_, n, value);
      next_ = start;
      load_gradients(begin, n, &nonfinite);
      loops_.add_gradient(value, before_, call_.options, grad_, DType::kFloat32, 1.0f, n);
      add_others();
    }
  }
  nonfinite_ += nonfinite;
  if (largest >= kInfKey) keep_finite(value, begin, n);
}

void RulePass::load_gradients(int64_t begin, int64_t n, uint32_t* nonfinite) {
  for_each_gradient(begin, n,
                    [&](const void* data, DType dtype, float factor, int64_t at, int64_t length) {
                      loops_.load_gradient(grad_ + at, data, dtype, factor, length, nonfinite);
                    });
}

template <class Function>
void RulePass::for_each_gradient(int64_t begin, int64_t n, const Function& function) {
  for_each_piece(call_.grads, &next_.grad, begin, begin + n,
                 [&](const Segment& grad, int64_t i, int64_t at, int64_t length) {
                   if (overflowed_) {
                     function(kZeros, DType::kFloat32, 1.0f, at, length);
                   } else if (!grad.data) {
                     function(kZeros, DType::kFloat32, factor_, at, length);
                   } else {
                     function(element(grad, i), grad.dtype, factor_, at, length);
                     next_gradients_ = {element(grad, i + length), element_size(grad.dtype)};
                     return;
                   }
                   next_gradients_ = {};
                 });
}

uint32_t RulePass::add_decay(float* value, int64_t begin, int64_t n, float zero) {
  uint32_t largest = 0;
  for_each_piece(call_.params, &next_.param, begin, begin + n,
                 [&](const Segment& param, int64_t i, int64_t at, int64_t length) {
                   largest = std::max(
                       largest, loops_.add_multiple(value + at, element(param, i), param.dtype,
                                                    call_.options.weight_decay, zero, length));
                 });
  return largest;
}

uint32_t RulePass::add_global_momentum(float* value, int64_t begin, int64_t n) {
  if (aggregate_.dense)
    return loops_.add_multiple(value, aggregate_.dense + begin, DType::kFloat32, momentum_, 0.0f,
                               n);
  if (!aggregate_.sparse) return 0;
  if (begin % kTile == 0) {
    entries_ = aggregate_entries(aggregate_.sparse, call_.numel, begin / kTile);
    next_.entry = 0;
  }
  return loops_.add_entries(value, begin % kTile, n, entries_.indices, entries_.values,
                            entries_.count, momentum_, &next_.entry);
}

// An overflow of float32 (or a non-finite parameter) leaves the element as it was.
void RulePass::keep_finite(float* value, int64_t begin, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (is_finite(value[i])) continue;
    value[i] = finite_or_zero(before_[i]);
    if (call_.momentum_buffer) call_.momentum_buffer[begin + i] = finite_or_zero(buffer_before_[i]);
    ++nonfinite_;
  }
}

}  // namespace gmc::cpu
