// Sizes of blocks and work tiles. The executor's tests define small ones, so that every loop runs
// more than once on a few thousand elements.
#pragma once

#include "shared/payload.h"

#ifndef GMC_THREADS
#define GMC_THREADS 256
#endif
#ifndef GMC_LOOK_THREADS
#define GMC_LOOK_THREADS 1024
#endif
#ifndef GMC_GROUPS
#define GMC_GROUPS 1024
#endif
#ifndef GMC_REPAIR_BLOCKS
#define GMC_REPAIR_BLOCKS 512
#endif
#ifndef GMC_SCAN_TILES
#define GMC_SCAN_TILES GMC_THREADS
#endif
#ifndef GMC_MERGE_THREADS
#define GMC_MERGE_THREADS 512
#endif
#ifndef GMC_MERGE_WINDOW
#define GMC_MERGE_WINDOW 6144
#endif
#ifndef GMC_INLINE_SEGMENTS
#define GMC_INLINE_SEGMENTS 220
#endif
#ifndef GMC_LARGEST_COUNT
#define GMC_LARGEST_COUNT (1 << 24)
#endif

namespace gmc::cuda {

constexpr int kThreads = GMC_THREADS;
constexpr int kWarps = kThreads / 32;

constexpr int kLookThreads = GMC_LOOK_THREADS;  // of the one block of look

// A work tile is what one block of the pass holds in registers: a thread has kQuads times four
// consecutive elements. It is independent of the wire's tile of 65,536 elements and of the
// aggregate's runs, but divides them.
constexpr int kQuads = 4;
constexpr int kPerThread = 4 * kQuads;
constexpr int kWorkTile = kThreads * kPerThread;
static_assert(kAggregateRun % kWorkTile == 0, "a work tile must not span two runs");
static_assert(kThreads % 32 == 0 && kWorkTile < 65536, "counts of a work tile fit in 16 bits");

// The selection gives each block one run of consecutive work tiles, so that a prefix over all tiles
// is one over at most this many sums.
constexpr int kMaxGroups = GMC_GROUPS;
constexpr int kResidentBlocks =
    6;  // blocks of emit on a multiprocessor; refine and count need less
constexpr int kScanTiles = GMC_SCAN_TILES;  // how many tiles of such a run are placed at a time
static_assert(kScanTiles <= kThreads, "one thread places one tile");

// The repair usually has nothing to do, so its blocks should all start, and end, at once.
constexpr int kRepairBlocks = GMC_REPAIR_BLOCKS;

constexpr int kMergeThreads = GMC_MERGE_THREADS;
constexpr int kMergeWarps = kMergeThreads / 32;
constexpr int kMergeWindow = GMC_MERGE_WINDOW;  // merged entries summed at a time

// How many segments travel as kernel parameters, whose limit is 4 KiB on older drivers.
constexpr int kInlineSegments = GMC_INLINE_SEGMENTS;

// A float32 sum over ranks counts on exactly up to here. A count that stops here does not depend on
// the order in which blocks add to it.
constexpr uint32_t kLargestCount = GMC_LARGEST_COUNT;

GMC_HD int64_t work_tile_count(int64_t numel) { return (numel + kWorkTile - 1) / kWorkTile; }

}  // namespace gmc::cuda
