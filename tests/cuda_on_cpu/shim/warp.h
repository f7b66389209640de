// Warp votes, shuffles, reductions and matches. A collective completes when every lane that its
// mask names has called it, from the same line with the same mask.
#pragma once

#include <type_traits>

#include "../executor/executor.h"
#include "sync.h"

namespace cuda_on_cpu {
template <class T>
uint64_t to_word(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_arithmetic_v<T>);
  uint64_t word = 0;
  memcpy(&word, &value, sizeof(T));
  return word;
}
template <class T>
T from_word(uint64_t word) {
  T value;
  memcpy(&value, &word, sizeof(T));
  return value;
}
template <class T>
T shuffle(WarpOp op, unsigned mask, T value, int operand, int width, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 4- and 8-byte numbers");
  return from_word<T>(warp_collective(op, mask, to_word(value), operand, width, site));
}
inline uint64_t vote(unsigned mask, int predicate, Site site) {
  return warp_collective(WarpOp::ballot, mask, predicate != 0, 0, 32, site);
}
}  // namespace cuda_on_cpu

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::shuffle(cuda_on_cpu::WarpOp::shuffle, mask, value, lane, width,
                              {"__shfl_sync", file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::shuffle(cuda_on_cpu::WarpOp::shuffle_up, mask, value, int(delta), width,
                              {"__shfl_up_sync", file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::shuffle(cuda_on_cpu::WarpOp::shuffle_down, mask, value, int(delta), width,
                              {"__shfl_down_sync", file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::shuffle(cuda_on_cpu::WarpOp::shuffle_xor, mask, value, lanes, width,
                              {"__shfl_xor_sync", file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return unsigned(cuda_on_cpu::vote(mask, predicate, {"__ballot_sync", file, line}));
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote(mask, predicate, {"__any_sync", file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote(mask, predicate, {"__all_sync", file, line}) == mask;
}
// CUDA promises no more than that the caller is in it.
inline unsigned __activemask() { return 1u << cuda_on_cpu::lane(); }

#define CUDA_ON_CPU_REDUCE(name, T, op)                                                        \
  inline T name(unsigned mask, T value, CUDA_ON_CPU_SITE) {                                    \
    return cuda_on_cpu::from_word<T>(cuda_on_cpu::warp_collective(                             \
        cuda_on_cpu::WarpOp::op, mask, uint64_t(int64_t(value)), 0, 32, {#name, file, line})); \
  }
CUDA_ON_CPU_REDUCE(__reduce_add_sync, int, add)
CUDA_ON_CPU_REDUCE(__reduce_add_sync, unsigned, add)
CUDA_ON_CPU_REDUCE(__reduce_min_sync, int, min)
CUDA_ON_CPU_REDUCE(__reduce_min_sync, unsigned, min)
CUDA_ON_CPU_REDUCE(__reduce_max_sync, int, max)
CUDA_ON_CPU_REDUCE(__reduce_max_sync, unsigned, max)
CUDA_ON_CPU_REDUCE(__reduce_and_sync, unsigned, bit_and)
CUDA_ON_CPU_REDUCE(__reduce_or_sync, unsigned, bit_or)
CUDA_ON_CPU_REDUCE(__reduce_xor_sync, unsigned, bit_xor)
#undef CUDA_ON_CPU_REDUCE

template <class T>
unsigned __match_any_sync(unsigned mask, T value, CUDA_ON_CPU_SITE) {
  return unsigned(cuda_on_cpu::warp_collective(cuda_on_cpu::WarpOp::match, mask,
                                               cuda_on_cpu::to_word(value), 0, 32,
                                               {"__match_any_sync", file, line}));
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all, CUDA_ON_CPU_SITE) {
  const unsigned equal = unsigned(cuda_on_cpu::warp_collective(cuda_on_cpu::WarpOp::match, mask,
                                                               cuda_on_cpu::to_word(value), 0, 32,
                                                               {"__match_all_sync", file, line}));
  *all = equal == mask;
  return *all ? mask : 0;
}
#undef CUDA_ON_CPU_SITE
