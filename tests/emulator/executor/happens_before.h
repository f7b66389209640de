// Tells the thread sanitizer which accesses CUDA orders: those on both sides of a barrier, those on
// both sides of a fence - atomic - atomic - fence chain, and those of one launch after the previous
// one's. Everything is empty in the other flavours.
#pragma once

namespace emulator {
struct Thread;
}

namespace emulator::happens_before {

// A fiber of the sanitizer, ordered after the launches before and unordered with every other block.
// Creating one takes it half a millisecond, so they are used again in later launches.
void* new_thread(const Thread& thread);
void thread_retired(const Thread& thread);

void block_started();             // by the host, with shared memory and stacks ready
void thread_started();            // by the thread
void* arrive_at_block_barrier();  // returns the tag to leave with
void block_barrier_completed();
void* arrive_at_warp_barrier(const Thread&);
void warp_barrier_completed(const Thread&);
void leave(void* tag);
void before_atomic(void* address);
void thread_ended();  // by the thread
void launch_ended();  // by the host: everything that the threads did is past

}  // namespace emulator::happens_before
