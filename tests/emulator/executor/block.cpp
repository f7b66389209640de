#include "block.h"

#include <cstdio>
#include <memory>

#include "fiber.h"
#include "happens_before.h"
#include "report.h"
#include "shared_memory.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

const void* current_kernel = nullptr;
bool early_launch = false;
Thread* current_thread = nullptr;
std::vector<Thread> threads;

namespace {

std::vector<std::unique_ptr<Fiber>> fibers;  // one per thread of the largest block so far
std::vector<int> thread_of_slot;
unsigned ready_warps;  // bit w: ready_lanes[w] is not zero; both in scheduling order
unsigned ready_lanes[32];
bool hop;       // pick any ready thread, not the first in scheduling order
bool hop_once;  // whoever spins must not be picked again at once
Random* dice;   // null: threads run in order
void (*thread_body)(const void*);
const void* thread_closure;

// Of the barrier that threads wait at now.
size_t waiting;
int votes;
int last_votes;

void fiber_body() {
  happens_before::thread_started();
  thread_body(thread_closure);
  if (early_launch && !current_thread->waited)
    fail("a kernel that may start early never called cudaGridDependencySynchronize");
  happens_before::thread_ended();
  current_thread->state = Thread::exited;
}

int pick_bit(unsigned bits) {
  if (!hop && !hop_once) return __builtin_ctz(bits);
  const unsigned shift = dice->below(32);
  const unsigned rotated = shift == 0 ? bits : bits >> shift | bits << (32 - shift);
  return int((unsigned(__builtin_ctz(rotated)) + shift) % 32);
}

Thread& take_ready() {
  const int warp = pick_bit(ready_warps);
  const int lane = pick_bit(ready_lanes[warp]);
  ready_lanes[warp] &= ~(1u << lane);
  if (ready_lanes[warp] == 0) ready_warps &= ~(1u << warp);
  hop_once = false;
  return threads[size_t(thread_of_slot[size_t(32 * warp + lane)])];
}

void place_threads(int count) {
  const int warps = (count + 31) / 32;
  const bool shuffled = dice != nullptr;
  Random in_order(0);
  Random& random = shuffled ? *dice : in_order;
  // Half of the blocks switch at random, half let one warp run as far ahead as it can.
  hop = shuffled && random.below(2) == 0;
  threads.resize(size_t(count));
  thread_of_slot.assign(size_t(32 * warps), -1);
  const std::vector<int> place_of_warp = random.order(warps, shuffled);
  std::vector<int> place_of_lane;
  for (int number = 0; number < count; ++number) {
    if (number % 32 == 0) place_of_lane = random.order(32, shuffled);
    Thread& thread = threads[size_t(number)];
    thread = Thread{};
    thread.number = number;
    const unsigned n = unsigned(number);
    thread.index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / (blockDim.x * blockDim.y)};
    thread.slot = 32 * place_of_warp[size_t(thread.warp())] + place_of_lane[size_t(thread.lane())];
    thread_of_slot[size_t(thread.slot)] = number;
    make_ready(thread);
  }
}

// Every thread waits or has left, and at least one waits: says who waits for whom.
[[noreturn]] void report_stuck() {
  char waiter[256], other[256];
  for (Thread& thread : threads) {
    if (thread.state != Thread::at_warp_collective) continue;
    for (int lane = 0; lane < 32; ++lane) {
      if ((thread.mask >> lane & 1) == 0) continue;
      const size_t number = size_t(32 * thread.warp() + lane);
      current_thread = &thread;
      threadIdx = thread.index;
      thread.describe(waiter, sizeof waiter);
      if (number >= threads.size())
        fail("%s, but the mask 0x%08x names lane %d, which the block does not have", waiter,
             thread.mask, lane);
      const Thread& named = threads[number];
      if (meets(thread, named)) continue;
      named.describe(other, sizeof other);
      fail("divergent warp: %s, but lane %d of its mask 0x%08x does not arrive: %s", waiter, lane,
           thread.mask, other);
    }
  }
  const Thread* first = nullptr;
  for (const Thread& thread : threads)
    if (first == nullptr && thread.state == Thread::at_block_barrier) first = &thread;
  first->describe(waiter, sizeof waiter);
  for (const Thread& thread : threads)
    if (thread.state != Thread::at_block_barrier) {
      current_thread = nullptr;
      thread.describe(other, sizeof other);
      fail("divergent barrier: %s, but %s", waiter, other);
    }
  fail("every thread waits, for no reason known");
}

}  // namespace

void Thread::describe(char* text, size_t size) const {
  if (state == exited)
    snprintf(text, size, "thread (%u, %u, %u) has left the kernel", index.x, index.y, index.z);
  else
    snprintf(text, size, "thread (%u, %u, %u) waits in %s at %s:%d", index.x, index.y, index.z,
             site.what, site.file, site.line);
}

void make_ready(Thread& thread) {
  thread.state = Thread::ready;
  ready_lanes[thread.slot / 32] |= 1u << (thread.slot % 32);
  ready_warps |= 1u << (thread.slot / 32);
}

void suspend(Thread::State reason) {
  current_thread->state = reason;
  Fiber::suspend();
}

void yield() {
  hop_once = dice != nullptr;
  make_ready(*current_thread);
  Fiber::suspend();
}

void wait_for_launch_before() { current_thread->waited = true; }

int lane() { return current_thread->lane(); }

void run_block(void (*body)(const void*), const void* closure, Random& random, bool in_order) {
  thread_body = body;
  thread_closure = closure;
  dice = in_order ? nullptr : &random;
  waiting = 0;
  votes = 0;
  ready_warps = 0;
  place_threads(int(blockDim.x * blockDim.y * blockDim.z));
  while (fibers.size() < threads.size()) fibers.push_back(std::make_unique<Fiber>(fiber_body));
  for (Thread& thread : threads) {
    thread.sanitizer_thread = happens_before::new_thread(thread);
    fibers[size_t(thread.number)]->renew(thread.sanitizer_thread);
  }
  happens_before::block_started();
  size_t left = threads.size();
  while (left > 0) {
    if (ready_warps == 0) report_stuck();
    Thread& thread = take_ready();
    current_thread = &thread;
    threadIdx = thread.index;
    fibers[size_t(thread.number)]->resume();
    if (thread.state == Thread::exited) {
      happens_before::thread_retired(thread);
      --left;
    }
  }
  current_thread = nullptr;
}

int block_barrier(int predicate, Site site) {
  Thread& self = *current_thread;
  self.site = site;
  void* tag = happens_before::arrive_at_block_barrier();
  votes += predicate != 0;
  if (++waiting < threads.size()) {
    suspend(Thread::at_block_barrier);
  } else {
    self.state = Thread::at_block_barrier;
    char mine[256], other[256];
    for (Thread& thread : threads) {
      if (!(thread.site == site)) {
        self.describe(mine, sizeof mine);
        thread.describe(other, sizeof other);
        fail("divergent barrier: %s, but %s", mine, other);
      }
    }
    happens_before::block_barrier_completed();
    last_votes = votes;
    votes = 0;
    waiting = 0;
    for (Thread& thread : threads) make_ready(thread);
    Fiber::suspend();
  }
  happens_before::leave(tag);
  return last_votes;
}

}  // namespace emulator
