// Barriers and fences.
#pragma once

#include "../executor/executor.h"

#define EMULATOR_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATOR_SITE) {
  emulator::block_barrier(0, {"__syncthreads", file, line});
}
inline int __syncthreads_count(int predicate, EMULATOR_SITE) {
  return emulator::block_barrier(predicate, {"__syncthreads_count", file, line});
}
inline int __syncthreads_or(int predicate, EMULATOR_SITE) {
  return emulator::block_barrier(predicate, {"__syncthreads_or", file, line}) != 0;
}
inline int __syncthreads_and(int predicate, EMULATOR_SITE) {
  return emulator::block_barrier(predicate == 0, {"__syncthreads_and", file, line}) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_SITE) {
  emulator::warp_collective(emulator::WarpOp::sync, mask, 0, 0, 32, {"__syncwarp", file, line});
}

inline void __threadfence() { emulator::fence(); }
inline void __threadfence_block() { emulator::fence(); }
inline void __threadfence_system() { emulator::fence(); }
inline void __nanosleep(unsigned) { emulator::yield(); }
inline void __trap(EMULATOR_SITE) { emulator::trap({"__trap", file, line}); }

inline void cudaGridDependencySynchronize() { emulator::wait_for_launch_before(); }
inline void cudaTriggerProgrammaticLaunchCompletion() { emulator::let_next_launch_start(); }
