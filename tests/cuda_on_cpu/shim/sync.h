// Barriers and fences.
#pragma once

#include "../executor/executor.h"

#define CUDA_ON_CPU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_ON_CPU_SITE) {
  cuda_on_cpu::block_barrier(0, {"__syncthreads", file, line});
}
inline int __syncthreads_count(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_barrier(predicate, {"__syncthreads_count", file, line});
}
inline int __syncthreads_or(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_barrier(predicate, {"__syncthreads_or", file, line}) != 0;
}
inline int __syncthreads_and(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_barrier(predicate == 0, {"__syncthreads_and", file, line}) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::warp_collective(cuda_on_cpu::WarpOp::sync, mask, 0, 0, 32,
                               {"__syncwarp", file, line});
}

inline void __threadfence() { cuda_on_cpu::fence(); }
inline void __threadfence_block() { cuda_on_cpu::fence(); }
inline void __threadfence_system() { cuda_on_cpu::fence(); }
inline void __nanosleep(unsigned) { cuda_on_cpu::yield(); }
inline void __trap(CUDA_ON_CPU_SITE) { cuda_on_cpu::trap({"__trap", file, line}); }

// Launches run one after the other here, so a kernel never starts before its predecessor ended.
inline void cudaGridDependencySynchronize() { cuda_on_cpu::wait_for_launch_before(); }
inline void cudaTriggerProgrammaticLaunchCompletion() {}
