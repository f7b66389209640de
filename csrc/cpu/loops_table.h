// What loops.cpp offers: the loops over every element, for the best instruction set at hand.
#pragma once

#include <cstdint>

#include "shared/rule.h"

namespace gmc::cpu {

struct Loops {
  void (*load_gradient)(float* out, const void* grads, DType dtype, float factor, int64_t n,
                        uint32_t* nonfinite);
  uint32_t (*add_gradient)(float* value, float* before, RuleOptions options, const void* grads,
                           DType dtype, float factor, int64_t n);
  uint32_t (*add_multiple)(float* value, const void* other, DType dtype, float factor, float zero,
                           int64_t n);
  uint32_t (*local_momentum)(float* value, float* before, float* buffer, float* buffer_before,
                             const float* grad, float momentum, RuleOptions options, int64_t n);
  uint32_t (*add_entries)(float* value, int64_t origin, int64_t n, const uint16_t* indices,
                          const float* entries, int64_t count, float momentum, int64_t* entry);
  void (*apply_dense)(float* total, float* memory, void* params, DType dtype, float factor,
                      float lr, int64_t n);
  int64_t (*collect)(const float* value, int64_t n, uint32_t first_index, uint32_t threshold,
                     uint32_t* index, uint32_t* bits, const char* next_grads, int64_t grad_size);
};

const Loops& loops();

}  // namespace gmc::cpu
