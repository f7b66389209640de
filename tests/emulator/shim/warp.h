// Warp votes, shuffles, reductions and matches. A collective completes when every lane that its
// mask names has called it, from the same line with the same mask.
#pragma once

#include <type_traits>

#include "../executor/executor.h"
#include "sync.h"

namespace emulator {
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
}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMULATOR_SITE) {
  return emulator::shuffle(emulator::WarpOp::shuffle, mask, value, lane, width,
                           {"__shfl_sync", file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_SITE) {
  return emulator::shuffle(emulator::WarpOp::shuffle_up, mask, value, int(delta), width,
                           {"__shfl_up_sync", file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_SITE) {
  return emulator::shuffle(emulator::WarpOp::shuffle_down, mask, value, int(delta), width,
                           {"__shfl_down_sync", file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, EMULATOR_SITE) {
  return emulator::shuffle(emulator::WarpOp::shuffle_xor, mask, value, lanes, width,
                           {"__shfl_xor_sync", file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return unsigned(emulator::vote(mask, predicate, {"__ballot_sync", file, line}));
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return emulator::vote(mask, predicate, {"__any_sync", file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return emulator::vote(mask, predicate, {"__all_sync", file, line}) == mask;
}
// CUDA promises no more than that the caller is in it.
inline unsigned __activemask() { return 1u << emulator::lane(); }

#define EMULATOR_REDUCE(name, T, op)                                                        \
  inline T name(unsigned mask, T value, EMULATOR_SITE) {                                    \
    return emulator::from_word<T>(emulator::warp_collective(                                \
        emulator::WarpOp::op, mask, uint64_t(int64_t(value)), 0, 32, {#name, file, line})); \
  }
EMULATOR_REDUCE(__reduce_add_sync, int, add)
EMULATOR_REDUCE(__reduce_add_sync, unsigned, add)
EMULATOR_REDUCE(__reduce_min_sync, int, min)
EMULATOR_REDUCE(__reduce_min_sync, unsigned, min)
EMULATOR_REDUCE(__reduce_max_sync, int, max)
EMULATOR_REDUCE(__reduce_max_sync, unsigned, max)
EMULATOR_REDUCE(__reduce_and_sync, unsigned, bit_and)
EMULATOR_REDUCE(__reduce_or_sync, unsigned, bit_or)
EMULATOR_REDUCE(__reduce_xor_sync, unsigned, bit_xor)
#undef EMULATOR_REDUCE

template <class T>
unsigned __match_any_sync(unsigned mask, T value, EMULATOR_SITE) {
  return unsigned(emulator::warp_collective(emulator::WarpOp::match, mask, emulator::to_word(value),
                                            0, 32, {"__match_any_sync", file, line}));
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all, EMULATOR_SITE) {
  const unsigned equal =
      unsigned(emulator::warp_collective(emulator::WarpOp::match, mask, emulator::to_word(value), 0,
                                         32, {"__match_all_sync", file, line}));
  *all = equal == mask;
  return *all ? mask : 0;
}
#undef EMULATOR_SITE
