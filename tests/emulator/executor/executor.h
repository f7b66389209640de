// What device code calls: the shim's barriers, warp collectives and atomics end up here.
#pragma once

#include <cstdint>
#include <cstring>

namespace emulator {

struct Site {
  const char* what;  // the CUDA function
  const char* file;
  int line;

  bool operator==(const Site& other) const {
    return line == other.line && same(what, other.what) && same(file, other.file);
  }

  static bool same(const char* a, const char* b) { return a == b || strcmp(a, b) == 0; }
};

enum class WarpOp {
  sync,
  ballot,
  match,
  shuffle,
  shuffle_up,
  shuffle_down,
  shuffle_xor,
  add,
  min,
  max,
  bit_and,
  bit_or,
  bit_xor,
};

// Waits for all threads of the block; returns how many passed a non-zero predicate.
int block_barrier(int predicate, Site site);

// Waits for all lanes in mask; returns this lane's result. Results are 64-bit words that hold the
// value in their low bytes.
uint64_t warp_collective(WarpOp op, unsigned mask, uint64_t word, int operand, int width,
                         Site site);

void wait_for_launch_before();
void let_next_launch_start();
int lane();
void yield();  // lets another thread of the block run
void fence();
// Around every atomic: yields now and then, and, for the thread sanitizer, orders a chain of
// fence, atomic, atomic on the same address, fence.
void before_atomic(void* address);
void after_atomic(void* address);
void float_atomic(Site site);  // an error, unless the case allows it
[[noreturn]] void trap(Site site);

}  // namespace emulator
