// The rule (rule.h) over a bucket, a chunk at a time: compress and accumulate share it.
#pragma once

#include "aggregate.h"
#include "loops_table.h"
#include "partition.h"
#include "shared/calls.h"

namespace gmc::cpu {

// a_{t-1} of global momentum in one of its forms. Both are nullptr where there is none.
struct LastAggregate {
  const uint8_t* sparse;
  const float* dense;
};

// Gradients that the next chunk will read, to be fetched early.
struct NextGradients {
  const char* data = nullptr;
  int64_t element_size = 0;
};

// One thread's way through a run of whole tiles; begin is the first element.
class RulePass {
 public:
  RulePass(const RuleCall& call, LastAggregate aggregate, int64_t begin);

  // Turns u into v in memory[begin, begin + n), n <= kChunk, and updates the momentum buffer.
  // Chunks must come in order, without gaps.
  void chunk(int64_t begin, int64_t n);

  uint64_t nonfinite() const { return nonfinite_; }
  const NextGradients& next_gradients() const { return next_gradients_; }

 private:
  void load_gradients(int64_t begin, int64_t n, uint32_t* nonfinite);  // to grad_
  // Calls function(data, dtype, factor, offset in the chunk, length) for each piece of the
  // gradient.
  template <class Function>
  void for_each_gradient(int64_t begin, int64_t n, const Function& function);
  uint32_t add_decay(float* value, int64_t begin, int64_t n, float zero);
  uint32_t add_global_momentum(float* value, int64_t begin, int64_t n);
  void keep_finite(float* value, int64_t begin, int64_t n);

  const RuleCall& call_;
  const float momentum_, factor_;  // factor: what a gradient is multiplied by
  const bool overflowed_;
  const LastAggregate aggregate_;
  const Loops& loops_;
  // Where the next chunk begins: in which segments, and at which of the tile's entries.
  struct Places {
    size_t grad, param;
    int64_t entry;
  } next_;
  AggregateEntries entries_{};
  uint64_t nonfinite_ = 0;
  NextGradients next_gradients_;
  alignas(64) float before_[kChunk];
  alignas(64) float buffer_before_[kChunk];
  alignas(64) float grad_[kChunk];
};

}  // namespace gmc::cpu
