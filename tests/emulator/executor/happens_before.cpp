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

extern "C" {
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}

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
// By block, warp and mask.
std::map<std::tuple<uint64_t, int, unsigned>, Barrier> warp_barriers;
uint64_t blocks_started = 0;

Barrier& warp_barrier(const Thread& thread) {
  return warp_barriers[{blocks_started, thread.warp(), thread.mask}];
}

// Each takes 0.8 MB, and the sanitizer knows 8128 threads at most.
constexpr size_t most_fibers = 2048;
std::vector<void*> unused_fibers;  // that the host has caught up with
std::vector<void*> past_fibers;    // that it has not
size_t fiber_count = 0;
Random dice(1);

// A new fiber knows all that the one knows which creates it. This one has never waited for
// anything.
void* ignorant_fiber() {
  static void* const fiber = __tsan_create_fiber(0);
  return fiber;
}

void* create_fiber() {
  void* const host = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(ignorant_fiber(), __tsan_switch_to_fiber_no_sync);
  void* const fiber = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(host, __tsan_switch_to_fiber_no_sync);
  return fiber;
}

void* take(std::vector<void*>& fibers) {
  std::swap(fibers[dice.below(unsigned(fibers.size()))], fibers.back());
  void* fiber = fibers.back();
  fibers.pop_back();
  return fiber;
}

}  // namespace

Unseen::Unseen() { AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
Unseen::~Unseen() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__); }

void* new_thread(const Block& block, const Thread& thread) {
  if (unused_fibers.empty() && fiber_count >= most_fibers) {
    // In random order, because the sanitizer sees no race between a thread and a later one that
    // inherits its number.
    for (; !past_fibers.empty(); --fiber_count) __tsan_destroy_fiber(take(past_fibers));
  }
  if (unused_fibers.empty()) {
    unused_fibers.push_back(create_fiber());
    ++fiber_count;
  }
  void* fiber = take(unused_fibers);
  char name[128];
  snprintf(name, sizeof name, "block (%u, %u, %u) thread (%u, %u, %u)", block.index.x,
           block.index.y, block.index.z, thread.index.x, thread.index.y, thread.index.z);
  __tsan_set_fiber_name(fiber, name);
  return fiber;
}

void thread_retired(const Thread& thread) { past_fibers.push_back(thread.sanitizer_thread); }

void block_started() {
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
void acquire(const Ends& ends) {
  for (const auto& end : ends) __tsan_acquire(&end->clock);
}

void launch_issued(Launch& launch) {
  (void)ignorant_fiber();  // before the first launch has run
  __tsan_release(&launch.issued);
}

// A launch that starts early finds what was past when the one before started or, if all of that
// one's threads waited before they let it start, what they had waited for.
void launch_begins(Launch& launch) {
  const Launch* previous = launch.previous.get();
  launch.known = previous == nullptr            ? launch.before
                 : previous->triggered_unwaited ? previous->known
                                                : previous->before;
}

void thread_started() {
  Launch& launch = *current_block->launch;
  __tsan_acquire(&launch.issued);
  acquire(launch.known);
}

void launch_before_ended() { acquire(current_block->launch->before); }
void thread_ended() { __tsan_release(&current_block->launch->end->clock); }
void host_waited(End& end) { __tsan_acquire(&end.clock); }

void all_past() {
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
Unseen::Unseen() {}
Unseen::~Unseen() {}
void launch_issued(Launch&) {}
void launch_begins(Launch&) {}
void host_waited(End&) {}
void all_past() {}
void* new_thread(const Block&, const Thread&) { return nullptr; }
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
void launch_before_ended() {}
}  // namespace happens_before

void fence() {}
void after_atomic(void*) {}

#endif

}  // namespace emulator
