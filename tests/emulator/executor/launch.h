// One launch of a kernel, or one copy, from when it is queued until its last block has ended.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "../shim/host_api.h"
#include "../shim/vector_types.h"

namespace emulator {

struct Block;

// Outlives its launch, for whoever is ordered after it.
struct End {
  bool reached = false;
  uint64_t clock = 0;  // of the thread sanitizer, by its address: what is past at the end
};
using Ends = std::vector<std::shared_ptr<End>>;

bool reached(const Ends& ends);

struct Launch {
  const void* kernel;
  dim3 grid, block;
  size_t dynamic_bytes;
  void (*body)(const void*);
  std::shared_ptr<const void> closure;
  unsigned stream;  // its number

  bool must_wait;                    // launched with programmatic stream serialization
  std::shared_ptr<Launch> previous;  // the kernel before it, if it may start before that one's end
  bool eager;                        // it does so as soon as it may; for schedule.cpp
  bool followed_early;               // the launch after it is eager
  // What ends before it starts or, where it may start early, before its wait returns.
  Ends before;
  std::shared_ptr<End> end;
  // For happens_before.cpp: what the host had done, and what was past when the first block started.
  uint64_t issued;
  Ends known;

  std::vector<int> order;  // of the blocks; empty until the first one begins
  size_t begun, ended;
  size_t triggered;             // blocks that let the next launch start, or have ended
  bool triggered_unwaited;      // by a thread that had not waited for the launch before
  bool waited;                  // some thread has
  std::vector<Block*> paused;   // may go on at once
  std::vector<Block*> waiting;  // may go on when `before` is reached

  size_t blocks() const { return size_t(grid.x) * grid.y * grid.z; }
};

}  // namespace emulator
