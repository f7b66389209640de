// One thread block: its threads, in which order they run, and where they wait.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "../shim/vector_types.h"
#include "executor.h"
#include "fiber.h"
#include "launch.h"
#include "random.h"
#include "shared_memory.h"

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulator {

struct Thread {
  enum State { ready, at_block_barrier, at_warp_collective, at_launch_before, exited };
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
  bool waited;             // for the launch before, by cudaGridDependencySynchronize
  void* sanitizer_thread;  // this and the rest for happens_before.cpp
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

struct Block {
  enum Stop { ended, waits, paused };

  Launch* launch;
  uint3 index;
  std::vector<Thread> threads;

  // Block `number` of a launch, whose threads run in an order drawn from random. in_order: they run
  // by index instead, with no early switches.
  void begin(Launch& launch, int number, Random& random, bool in_order);
  // Runs all threads until the block has ended, waits for the launch before, or pauses.
  Stop run();
  void make_ready(Thread& thread);

  // Of the barrier that threads wait at now.
  size_t waiting;
  int votes;
  int last_votes;

  bool hop_once;   // whoever spins must not be picked again at once
  Random* dice;    // null: threads run in order
  bool triggered;  // it has let the next launch start
  bool pauses;     // as soon as the current thread stops
  size_t held;     // threads that wait for the launch before

  std::vector<Line> shared_memory;  // while another block runs

 private:
  void place_threads(int count);
  int pick_bit(unsigned bits);
  Thread& take_ready();
  void let_go();
  void check_waits();
  [[noreturn]] void report_stuck();

  std::vector<std::unique_ptr<Fiber>> fibers_;  // one per thread of the largest block so far
  std::vector<int> thread_of_slot_;
  unsigned ready_warps_;  // bit w: ready_lanes_[w] is not zero; both in scheduling order
  unsigned ready_lanes_[32] = {};
  bool hop_;  // pick any ready thread, not the first in scheduling order
  size_t left_;
};

extern Block* current_block;    // null while the host runs
extern Thread* current_thread;  // null while the scheduler or the host runs

void suspend(Thread::State reason);  // the current thread stops here until make_ready

}  // namespace emulator
