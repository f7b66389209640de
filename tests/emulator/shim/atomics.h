// Atomics are relaxed, as CUDA's are: the thread sanitizer sees no order through one unless fences
// (__threadfence) stand on both sides.
#pragma once

#include "../executor/executor.h"

#define EMULATOR_ATOMIC(name, T, body) \
  inline T name(T* address, T value) { \
    emulator::before_atomic(address);  \
    const T old = body;                \
    emulator::after_atomic(address);   \
    return old;                        \
  }
#define EMULATOR_ATOMIC_LOOP(name, T, next)                                           \
  inline T name(T* address, T value) {                                                \
    emulator::before_atomic(address);                                                 \
    T old = __atomic_load_n(address, __ATOMIC_RELAXED);                               \
    while (!__atomic_compare_exchange_n(address, &old, next, false, __ATOMIC_RELAXED, \
                                        __ATOMIC_RELAXED)) {                          \
    }                                                                                 \
    emulator::after_atomic(address);                                                  \
    return old;                                                                       \
  }
#define EMULATOR_ATOMIC_CAS(T)                                                     \
  inline T atomicCAS(T* address, T compare, T value) {                             \
    emulator::before_atomic(address);                                              \
    __atomic_compare_exchange_n(address, &compare, value, false, __ATOMIC_RELAXED, \
                                __ATOMIC_RELAXED);                                 \
    emulator::after_atomic(address);                                               \
    return compare;                                                                \
  }
#define EMULATOR_INTEGER_ATOMICS(T)                                                     \
  EMULATOR_ATOMIC(atomicAnd, T, __atomic_fetch_and(address, value, __ATOMIC_RELAXED))   \
  EMULATOR_ATOMIC(atomicOr, T, __atomic_fetch_or(address, value, __ATOMIC_RELAXED))     \
  EMULATOR_ATOMIC(atomicXor, T, __atomic_fetch_xor(address, value, __ATOMIC_RELAXED))   \
  EMULATOR_ATOMIC(atomicExch, T, __atomic_exchange_n(address, value, __ATOMIC_RELAXED)) \
  EMULATOR_ATOMIC_LOOP(atomicMin, T, min(old, value))                                   \
  EMULATOR_ATOMIC_LOOP(atomicMax, T, max(old, value))                                   \
  EMULATOR_ATOMIC_CAS(T)

EMULATOR_INTEGER_ATOMICS(int)
EMULATOR_INTEGER_ATOMICS(unsigned int)
EMULATOR_INTEGER_ATOMICS(unsigned long long)
EMULATOR_ATOMIC_CAS(unsigned short)
EMULATOR_ATOMIC(atomicAdd, int, __atomic_fetch_add(address, value, __ATOMIC_RELAXED))
EMULATOR_ATOMIC(atomicAdd, unsigned int, __atomic_fetch_add(address, value, __ATOMIC_RELAXED))
EMULATOR_ATOMIC(atomicAdd, unsigned long long, __atomic_fetch_add(address, value, __ATOMIC_RELAXED))
EMULATOR_ATOMIC(atomicSub, int, __atomic_fetch_sub(address, value, __ATOMIC_RELAXED))
EMULATOR_ATOMIC(atomicSub, unsigned int, __atomic_fetch_sub(address, value, __ATOMIC_RELAXED))
EMULATOR_ATOMIC_LOOP(atomicInc, unsigned int, (old >= value ? 0u : old + 1))
EMULATOR_ATOMIC_LOOP(atomicDec, unsigned int, (old == 0 || old > value ? value : old - 1))

#undef EMULATOR_ATOMIC
#undef EMULATOR_ATOMIC_LOOP
#undef EMULATOR_ATOMIC_CAS
#undef EMULATOR_INTEGER_ATOMICS

inline float atomicExch(float* address, float value) {
  return __uint_as_float(
      atomicExch(reinterpret_cast<unsigned int*>(address), __float_as_uint(value)));
}

namespace emulator {
// Floating-point addition is not associative: the result of such an atomic depends on the schedule.
template <class T, class Bits>
T float_atomic_add(T* address, T value, Site site) {
  float_atomic(site);
  before_atomic(address);
  Bits* bits = reinterpret_cast<Bits*>(address);
  Bits old = __atomic_load_n(bits, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(bits, &old, bit_cast<Bits>(bit_cast<T>(old) + value), false,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  after_atomic(address);
  return bit_cast<T>(old);
}
}  // namespace emulator

inline float atomicAdd(float* address, float value, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  return emulator::float_atomic_add<float, uint32_t>(address, value, {"atomicAdd", file, line});
}
inline double atomicAdd(double* address, double value, const char* file = __builtin_FILE(),
                        int line = __builtin_LINE()) {
  return emulator::float_atomic_add<double, uint64_t>(address, value, {"atomicAdd", file, line});
}
