#include "block.h"

#include <cstdio>

#include "happens_before.h"
#include "report.h"
#include "schedule.h"
#include "shared_memory.h"
#include "watchdog.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

Block* current_block = nullptr;
Thread* current_thread = nullptr;

namespace {

// Parameters are each thread's own here, so what another thread keeps a pointer to is gone.
__attribute__((noinline)) void spoil_parameters() {
  volatile unsigned junk[1536];
  for (volatile unsigned& word : junk) word = 0x7e7e7e7eu;
}

void fiber_body() {
  const Launch& launch = *current_block->launch;
  happens_before::thread_started();
  launch.body(launch.closure.get());
  if (current_thread->lane() == 0) spoil_parameters();
  happens_before::thread_ended();
  current_thread->state = Thread::exited;
}

}  // namespace

int Block::pick_bit(unsigned bits) {
  if (!hop_ && !hop_once) return __builtin_ctz(bits);
  const unsigned shift = dice->below(32);
  const unsigned rotated = shift == 0 ? bits : bits >> shift | bits << (32 - shift);
  return int((unsigned(__builtin_ctz(rotated)) + shift) % 32);
}

Thread& Block::take_ready() {
  const int warp = pick_bit(ready_warps_);
  const int lane = pick_bit(ready_lanes_[warp]);
  ready_lanes_[warp] &= ~(1u << lane);
  if (ready_lanes_[warp] == 0) ready_warps_ &= ~(1u << warp);
  hop_once = false;
  return threads[size_t(thread_of_slot_[size_t(32 * warp + lane)])];
}

void Block::place_threads(int count) {
  const int warps = (count + 31) / 32;
  const bool shuffled = dice != nullptr;
  Random in_order(0);
  Random& random = shuffled ? *dice : in_order;
  // Half of the blocks switch at random, half let one warp run as far ahead as it can.
  hop_ = shuffled && random.below(2) == 0;
  threads.resize(size_t(count));
  thread_of_slot_.assign(size_t(32 * warps), -1);
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
    thread_of_slot_[size_t(thread.slot)] = number;
    make_ready(thread);
  }
}

// Every thread waits or has left, and at least one waits: says who waits for whom.
void Block::report_stuck() {
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

void Thread::describe(char* text, size_t size) const {
  if (state == exited)
    snprintf(text, size, "thread (%u, %u, %u) has left the kernel", index.x, index.y, index.z);
  else
    snprintf(text, size, "thread (%u, %u, %u) waits in %s at %s:%d", index.x, index.y, index.z,
             site.what, site.file, site.line);
}

void Block::make_ready(Thread& thread) {
  thread.state = Thread::ready;
  ready_lanes_[thread.slot / 32] |= 1u << (thread.slot % 32);
  ready_warps_ |= 1u << (thread.slot / 32);
}

void suspend(Thread::State reason) {
  current_thread->state = reason;
  Fiber::suspend();
}

void yield() {
  Block& block = *current_block;
  block.hop_once = block.dice != nullptr;
  block.make_ready(*current_thread);
  Fiber::suspend();
}

void wait_for_launch_before() {
  Thread& self = *current_thread;
  Block& block = *current_block;
  if (!reached(block.launch->before)) {
    ++block.held;
    suspend(Thread::at_launch_before);
  }
  self.waited = true;
  block.launch->waited = true;
  happens_before::launch_before_ended();
}

void let_next_launch_start() {
  Block& block = *current_block;
  Launch& launch = *block.launch;
  if (launch.previous && !current_thread->waited) launch.triggered_unwaited = true;
  if (block.triggered) return;
  block.triggered = true;
  ++launch.triggered;
  if (!pauses_after_trigger(launch)) return;
  block.pauses = true;
  block.make_ready(*current_thread);
  Fiber::suspend();
}

int lane() { return current_thread->lane(); }

void Block::begin(Launch& of, int number, Random& random, bool in_order) {
  launch = &of;
  blockDim = of.block;
  const unsigned n = unsigned(number);
  index = {n % of.grid.x, n / of.grid.x % of.grid.y, n / of.grid.x / of.grid.y};
  dice = in_order ? nullptr : &random;
  waiting = 0;
  votes = 0;
  hop_once = false;
  triggered = false;
  pauses = false;
  held = 0;
  ready_warps_ = 0;
  place_threads(int(blockDim.x * blockDim.y * blockDim.z));
  left_ = threads.size();
  while (fibers_.size() < threads.size()) fibers_.push_back(std::make_unique<Fiber>(fiber_body));
  for (Thread& thread : threads) {
    thread.sanitizer_thread = happens_before::new_thread(*this, thread);
    fibers_[size_t(thread.number)]->renew(thread.sanitizer_thread);
  }
  begin_shared_memory(*this, random);
  happens_before::block_started();
}

// The launch before has ended.
void Block::let_go() {
  for (Thread& thread : threads)
    if (thread.state == Thread::at_launch_before) make_ready(thread);
  held = 0;
}

// What a thread does that has not waited for the launch before is not ordered after it.
void Block::check_waits() {
  const Thread *waited = nullptr, *other = nullptr;
  for (const Thread& thread : threads) (thread.waited ? waited : other) = &thread;
  if (waited == nullptr || other == nullptr) return;
  threadIdx = other->index;
  fail(
      "thread (%u, %u, %u) of a kernel that may start early never called "
      "cudaGridDependencySynchronize, but others of its block did",
      other->index.x, other->index.y, other->index.z);
}

Block::Stop Block::run() {
  current_block = this;
  gridDim = launch->grid;
  blockDim = launch->block;
  blockIdx = index;
  resume_shared_memory(*this);
  if (held > 0 && reached(launch->before)) let_go();
  start_watchdog();
  Stop stop = ended;
  while (left_ > 0 && stop == ended) {
    if (ready_warps_ == 0) {
      if (held == 0) report_stuck();
      stop = waits;
      break;
    }
    Thread& thread = take_ready();
    current_thread = &thread;
    threadIdx = thread.index;
    fibers_[size_t(thread.number)]->resume();
    if (thread.state == Thread::exited) {
      happens_before::thread_retired(thread);
      --left_;
    }
    if (pauses) stop = paused;
    pauses = false;
  }
  current_thread = nullptr;
  if (stop == ended) {
    if (launch->must_wait) check_waits();
    if (!triggered) ++launch->triggered;
    end_shared_memory();
  }
  current_block = nullptr;
  return stop;
}

int block_barrier(int predicate, Site site) {
  Thread& self = *current_thread;
  Block& block = *current_block;
  self.site = site;
  void* tag = happens_before::arrive_at_block_barrier();
  block.votes += predicate != 0;
  if (++block.waiting < block.threads.size()) {
    suspend(Thread::at_block_barrier);
  } else {
    self.state = Thread::at_block_barrier;
    char mine[256], other[256];
    for (Thread& thread : block.threads) {
      if (!(thread.site == site)) {
        self.describe(mine, sizeof mine);
        thread.describe(other, sizeof other);
        fail("divergent barrier: %s, but %s", mine, other);
      }
    }
    happens_before::block_barrier_completed();
    block.last_votes = block.votes;
    block.votes = 0;
    block.waiting = 0;
    for (Thread& thread : block.threads) block.make_ready(thread);
    Fiber::suspend();
  }
  happens_before::leave(tag);
  return block.last_votes;
}

}  // namespace emulator
