#include "rule_pass.h"

#include <algorithm>

#include "segments.h"

namespace gmc::cpu {
namespace {

constexpr float kZeros[kChunk] = {};

}  // namespace

RulePass::RulePass(const RuleArgs& args, LastAggregate aggregate, int64_t begin)
    : args_(args),
      aggregate_(aggregate),
      loops_(loops()),
      grad_segment_(find_segment(args.grads, begin)),
      param_segment_(find_segment(args.params, begin)) {}

void RulePass::chunk(int64_t begin, int64_t n) {
  float* value = args_.memory + begin;
  uint32_t largest = 0, nonfinite = 0;
  const auto keep_largest = [&](uint32_t key) { largest = std::max(largest, key); };
  if (args_.momentum_buffer) {
    for_each_gradient(begin, n,
                      [&](const void* data, DType dtype, float factor, int64_t at, int64_t length) {
                        loops_.load_gradient(grad_ + at, data, dtype, factor, length, &nonfinite);
                      });
    add_decay(grad_, begin, n, -0.0f);
    keep_largest(loops_.local_momentum(value, before_, args_.momentum_buffer + begin,
                                       buffer_before_, grad_, args_.momentum, args_.nesterov, n));
  } else {
    for_each_gradient(begin, n,
                      [&](const void* data, DType dtype, float factor, int64_t at, int64_t length) {
                        keep_largest(loops_.add_gradient(value + at, before_ + at, data, dtype,
                                                         factor, length, &nonfinite));
                      });
    keep_largest(add_decay(value, begin, n, 0.0f));
    keep_largest(add_global_momentum(value, begin, n));
  }
  nonfinite_ += nonfinite;
  if (largest >= kInfKey) keep_finite(value, begin, n);
}

template <class Function>
void RulePass::for_each_gradient(int64_t begin, int64_t n, const Function& function) {
  for_each_piece(args_.grads, &grad_segment_, begin, begin + n,
                 [&](const Segment& grad, int64_t i, int64_t at, int64_t length) {
                   if (args_.found_inf) {
                     function(kZeros, DType::kFloat32, 1.0f, at, length);
                   } else if (!grad.data) {
                     function(kZeros, DType::kFloat32, args_.grad_factor, at, length);
                   } else {
                     function(element(grad, i), grad.dtype, args_.grad_factor, at, length);
                     next_ = {element(grad, i + length), element_size(grad.dtype)};
                     return;
                   }
                   next_ = {};
                 });
}

uint32_t RulePass::add_decay(float* value, int64_t begin, int64_t n, float zero) {
  uint32_t largest = 0;
  for_each_piece(args_.params, &param_segment_, begin, begin + n,
                 [&](const Segment& param, int64_t i, int64_t at, int64_t length) {
                   largest = std::max(
                       largest, loops_.add_multiple(value + at, element(param, i), param.dtype,
                                                    args_.weight_decay, zero, length));
                 });
  return largest;
}

uint32_t RulePass::add_global_momentum(float* value, int64_t begin, int64_t n) {
  if (aggregate_.dense)
    return loops_.add_multiple(value, aggregate_.dense + begin, DType::kFloat32, args_.momentum,
                               0.0f, n);
  if (!aggregate_.sparse) return 0;
  if (begin % kTile == 0) {
    entries_ = aggregate_entries(aggregate_.sparse, args_.numel, begin / kTile);
    next_entry_ = 0;
  }
  const int64_t origin = begin % kTile;
  const uint16_t* next = entries_.indices + next_entry_;
  const uint16_t* last = entries_.indices + entries_.count;
  const int64_t count = std::lower_bound(next, last, origin + n) - next;
  const uint32_t largest =
      loops_.add_entries(value, origin, next, entries_.values + next_entry_, count, args_.momentum);
  next_entry_ += count;
  return largest;
}

// An overflow of float32 (or a non-finite parameter) leaves the element as it was.
void RulePass::keep_finite(float* value, int64_t begin, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (is_finite(value[i])) continue;
    value[i] = finite_or_zero(before_[i]);
    if (args_.momentum_buffer) args_.momentum_buffer[begin + i] = finite_or_zero(buffer_before_[i]);
    ++nonfinite_;
  }
}

}  // namespace gmc::cpu
