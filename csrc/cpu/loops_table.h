// What loops.cpp offers: the loops over every element, for the best instruction set at hand.
#pragma once

#include <cstdint>

#include "../numbers.h"

namespace gmc::cpu {

struct Loops {
  uint32_t (*load_gradient)(float* out, const void* grads, DType dtype, float factor, int64_t n);
  void (*add_decay)(float* sum, const void* params, DType dtype, float weight_decay, int64_t n);
  void (*add_memory)(float* sum, const float* memory, int64_t n);
  void (*local_momentum)(float* value, float* buffer, const float* memory, const float* old,
                         float momentum, bool nesterov, int64_t n);
  bool (*settle)(float* value, int64_t n);
  int64_t (*collect)(const float* value, int64_t n, uint32_t first_index, uint32_t threshold,
                     uint32_t* index, uint32_t* key);
};

const Loops& loops();

}  // namespace gmc::cpu
