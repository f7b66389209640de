// Warp collectives: the last lane to arrive computes everyone's result.
#include "block.h"
#include "happens_before.h"
#include "report.h"

namespace emulator {
namespace {

int source_lane(const Thread& thread) {
  const int lane = thread.lane(), width = thread.width;
  const int first = lane & ~(width - 1);
  switch (thread.op) {
    case WarpOp::shuffle:
      return first + (thread.operand & (width - 1));
    case WarpOp::shuffle_up:
      return lane - thread.operand < first ? lane : lane - thread.operand;
    case WarpOp::shuffle_down:
      return lane + thread.operand >= first + width ? lane : lane + thread.operand;
    default:
      return (lane ^ thread.operand) >= first + width ? lane : lane ^ thread.operand;
  }
}

uint64_t shuffled(Thread* warp, const Thread& thread) {
  if (thread.width < 1 || thread.width > 32 || (thread.width & (thread.width - 1)) != 0)
    fail("%s at %s:%d: width is %d, but must be a power of two up to 32", thread.site.what,
         thread.site.file, thread.site.line, thread.width);
  const int source = source_lane(thread);
  if (source < 0 || source > 31 || (thread.mask >> source & 1) == 0)
    fail("%s at %s:%d: lane %d reads from lane %d, which the mask 0x%08x does not name",
         thread.site.what, thread.site.file, thread.site.line, thread.lane(), source, thread.mask);
  return warp[source].word;
}

uint64_t reduced(WarpOp op, uint64_t a, uint64_t b) {
  switch (op) {
    case WarpOp::add:
      return a + b;
    case WarpOp::min:
      return int64_t(b) < int64_t(a) ? b : a;
    case WarpOp::max:
      return int64_t(b) > int64_t(a) ? b : a;
    case WarpOp::bit_and:
      return a & b;
    case WarpOp::bit_or:
      return a | b;
    default:
      return a ^ b;
  }
}

uint64_t result_for(Thread* warp, const Thread& thread) {
  uint64_t result = 0;
  switch (thread.op) {
    case WarpOp::sync:
      return 0;
    case WarpOp::shuffle:
    case WarpOp::shuffle_up:
    case WarpOp::shuffle_down:
    case WarpOp::shuffle_xor:
      return shuffled(warp, thread);
    case WarpOp::ballot:
    case WarpOp::match:
      for (int lane = 0; lane < 32; ++lane)
        if (thread.mask >> lane & 1) {
          const uint64_t wanted = thread.op == WarpOp::ballot ? 1 : thread.word;
          result |= uint64_t(warp[lane].word == wanted) << lane;
        }
      return result;
    default:
      result = thread.word;
      for (int lane = 0; lane < 32; ++lane)
        if ((thread.mask >> lane & 1) != 0 && lane != thread.lane())
          result = reduced(thread.op, result, warp[lane].word);
      return result;
  }
}

}  // namespace

uint64_t warp_collective(WarpOp op, unsigned mask, uint64_t word, int operand, int width,
                         Site site) {
  Thread& self = *current_thread;
  if ((mask >> self.lane() & 1) == 0)
    fail("%s at %s:%d: the mask 0x%08x does not name the calling lane %d", site.what, site.file,
         site.line, mask, self.lane());
  self.op = op;
  self.mask = mask;
  self.word = word;
  self.operand = operand;
  self.width = width;
  self.site = site;
  self.state = Thread::at_warp_collective;
  // CUDA promises an order of memory accesses for __syncwarp alone.
  void* tag = op == WarpOp::sync ? happens_before::arrive_at_warp_barrier(self) : nullptr;

  Block& block = *current_block;
  Thread* warp = &block.threads[size_t(32 * self.warp())];
  const size_t lanes = block.threads.size() - size_t(32 * self.warp());
  bool complete = true;
  for (size_t lane = 0; lane < 32 && complete; ++lane)
    if (mask >> lane & 1) complete = lane < lanes && meets(self, warp[lane]);
  if (complete) {
    if (op == WarpOp::sync) happens_before::warp_barrier_completed(self);
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) warp[lane].result = result_for(warp, warp[lane]);
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) block.make_ready(warp[lane]);
  }
  Fiber::suspend();
  if (tag != nullptr) happens_before::leave(tag);
  return self.result;
}

}  // namespace emulator
