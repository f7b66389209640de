// Tells the thread sanitizer which accesses CUDA orders: those on both sides of a barrier, those on
// both sides of a fence - atomic - atomic - fence chain, and those of launches of which one waits
// for the other. Everything is empty in the other flavours.
#pragma once

namespace emulator {
struct Block;
struct End;
struct Launch;
struct Thread;
}  // namespace emulator

namespace emulator::happens_before {

// What the executor itself does meanwhile to memory is no access: it hands memory to threads.
class Unseen {
 public:
  Unseen();
  ~Unseen();
  Unseen(const Unseen&) = delete;
};

void launch_issued(Launch& launch);  // by the host: its threads know what the host has done
void launch_begins(Launch& launch);
void host_waited(End& end);
// The host has waited for everything that ran: its fibers may be used again.
void all_past();

// A fiber of the sanitizer, unordered with every other until thread_started(). Creating one takes
// it half a millisecond, so they are used again.
void* new_thread(const Block& block, const Thread& thread);
void thread_retired(const Thread& thread);

void block_started();             // by the scheduler
void thread_started();            // by the thread
void launch_before_ended();       // by a thread that has waited for it
void* arrive_at_block_barrier();  // returns the tag to leave with
void block_barrier_completed();
void* arrive_at_warp_barrier(const Thread&);
void warp_barrier_completed(const Thread&);
void leave(void* tag);
void before_atomic(void* address);
void thread_ended();  // by the thread

}  // namespace emulator::happens_before
