// One thread block: its threads, in which order they run, and where they wait.
#pragma once

#include <cstddef>
#include <vector>

#include "../shim/vector_types.h"
#include "executor.h"
#include "random.h"

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulator {

struct Thread {
  enum State { ready, at_block_barrier, at_warp_collective, exited };
  State state;
  uint3 index;
  int number;  // linear index in the block
  int slot;    // place in the scheduling order: 32 * warp's place + lane's place
  Site site;   // where it waits
  WarpOp op;   // of the warp collective it waits in, with the operands
  unsigned mask;
  uint64_t word;
  int operand, width;
  uint64_t result;
  void* sanitizer_thread;  // this and the rest for happens_before.cpp
  bool waited;             // for the launch before, by cudaGridDependencySynchronize
  bool fenced;
  void* recent_atomics[8];
  unsigned recent_count;

  int warp() const { return number / 32; }
  int lane() const { return number % 32; }
  void describe(char* text, size_t size) const;
};

// Whether b waits in the same warp collective as a.
inline bool meets(const Thread& a, const Thread& b) {
  return b.state == Thread::at_warp_collective && b.mask == a.mask && b.site == a.site;
}

extern const void* current_kernel;
extern bool early_launch;       // it may have started before the kernel before it ended
extern Thread* current_thread;  // null while the scheduler or the host runs
extern std::vector<Thread> threads;

// Runs all threads of block blockIdx, each calling body(closure), in an order drawn from random.
// in_order: threads run by index instead, with no early switches.
void run_block(void (*body)(const void*), const void* closure, Random& random, bool in_order);

void suspend(Thread::State reason);  // the current thread stops here until make_ready
void make_ready(Thread& thread);

}  // namespace emulator
