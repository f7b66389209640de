#include "happens_before.h"

#include <cstdio>
#include <map>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "block.h"

namespace emulator {

#if defined(EXECUTOR_THREAD)
#include <sanitizer/tsan_interface.h>

namespace happens_before {
namespace {

// Two generations: a thread that hurries to the next barrier must not be seen by one that has not
// yet left this barrier. The one after that reuses the tag, and by then all have left.
struct Barrier {
  std::unique_ptr<uint64_t> tags[2] = {std::make_unique<uint64_t>(), std::make_unique<uint64_t>()};
  unsigned generation = 0;
  void* arrive() {
    void* tag = tags[generation % 2].get();
    __tsan_release(tag);
    return tag;
  }
};

std::unique_ptr<Barrier> block_barrier;
// By block, warp and mask. They live as long as the launch: a warp that met nothing but one of them
// made it, and the host has not caught up with that warp before.
std::map<std::tuple<uint64_t, int, unsigned>, Barrier> warp_barriers;
uint64_t blocks_started = 0;

Barrier& warp_barrier(const Thread& thread) {
  return warp_barriers[{blocks_started, thread.warp(), thread.mask}];
}

uint64_t launch_begin, launch_end;

// Each takes 0.8 MB, and the sanitizer knows 8128 threads at most.
constexpr size_t most_fibers = 1024;
std::vector<void*> unused_fibers;  // that the host has caught up with
std::vector<void*> past_fibers;    // of this launch
size_t fiber_count = 0;
Random dice(1);

void* take(std::vector<void*>& fibers) {
  std::swap(fibers[dice.below(unsigned(fibers.size()))], fibers.back());
  void* fiber = fibers.back();
  fibers.pop_back();
  return fiber;
}

}  // namespace

void* new_thread(const Thread& thread) {
  if (unused_fibers.empty() && fiber_count >= most_fibers) {
    // In random order, because the sanitizer sees no race between a thread and a later one that
    // inherits its number.
    for (; !past_fibers.empty(); --fiber_count) __tsan_destroy_fiber(take(past_fibers));
  }
  if (unused_fibers.empty()) {
    unused_fibers.push_back(__tsan_create_fiber(0));
    ++fiber_count;
  }
  void* fiber = take(unused_fibers);
  char name[128];
  snprintf(name, sizeof name, "block (%u, %u, %u) thread (%u, %u, %u)", blockIdx.x, blockIdx.y,
           blockIdx.z, thread.index.x, thread.index.y, thread.index.z);
  __tsan_set_fiber_name(fiber, name);
  return fiber;
}

void thread_retired(const Thread& thread) { past_fibers.push_back(thread.sanitizer_thread); }

void block_started() {
  __tsan_release(&launch_begin);
  // Other tags for each block: what one block's threads did is unordered with the next block's.
  block_barrier = std::make_unique<Barrier>();
  ++blocks_started;
}

void* arrive_at_block_barrier() { return block_barrier->arrive(); }
void block_barrier_completed() { ++block_barrier->generation; }
void* arrive_at_warp_barrier(const Thread& thread) { return warp_barrier(thread).arrive(); }
void warp_barrier_completed(const Thread& thread) { ++warp_barrier(thread).generation; }
void leave(void* tag) { __tsan_acquire(tag); }
void before_atomic(void* address) {
  if (current_thread->fenced) __tsan_release(address);
}
void thread_ended() { __tsan_release(&launch_end); }
void thread_started() { __tsan_acquire(&launch_begin); }
void launch_ended() {
  __tsan_acquire(&launch_end);
  warp_barriers.clear();
  unused_fibers.insert(unused_fibers.end(), past_fibers.begin(), past_fibers.end());
  past_fibers.clear();
}

}  // namespace happens_before

void fence() {
  Thread& self = *current_thread;
  self.fenced = true;
  constexpr unsigned kept = sizeof self.recent_atomics / sizeof self.recent_atomics[0];
  for (unsigned i = 0; i < self.recent_count && i < kept; ++i)
    __tsan_acquire(self.recent_atomics[i]);
  self.recent_count = 0;
}

void after_atomic(void* address) {
  Thread& self = *current_thread;
  constexpr unsigned kept = sizeof self.recent_atomics / sizeof self.recent_atomics[0];
  self.recent_atomics[self.recent_count++ % kept] = address;
}

#else

namespace happens_before {
void* new_thread(const Thread&) { return nullptr; }
void thread_retired(const Thread&) {}
void block_started() {}
void thread_started() {}
void* arrive_at_block_barrier() { return nullptr; }
void block_barrier_completed() {}
void* arrive_at_warp_barrier(const Thread&) { return nullptr; }
void warp_barrier_completed(const Thread&) {}
void leave(void*) {}
void before_atomic(void*) {}
void thread_ended() {}
void launch_ended() {}
}  // namespace happens_before

void fence() {}
void after_atomic(void*) {}

#endif

}  // namespace emulator
