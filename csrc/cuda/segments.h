// The tensors of a bucket, in the order of its index space, as a table that kernels read.
//
// A short table travels by value in the kernel's parameters: nothing is copied, and a captured
// graph keeps its own. A longer table is written into device memory by kernels whose parameters
// carry it in pieces, because host memory that is copied from would have to outlive the call.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "shared/bucket.h"
#include "sizes.h"
#include "stream.h"

namespace gmc::cuda {

// A tensor of the table. It ends where the next one begins. data == nullptr stands for zeros.
struct TableSegment {
  void* data;
  uint32_t begin;
  DType dtype;
};
static_assert(sizeof(TableSegment) == 16, "two 8-byte words");

struct SegmentPiece {
  TableSegment segment[kInlineSegments];
};

// Where a kernel finds its segments: in `stored`, or from place `first` of its own parameters.
struct SegmentList {
  const TableSegment* stored;
  int first, count;

  GMC_HD const TableSegment* begin(const SegmentPiece& own) const {
    return stored ? stored : own.segment + first;
  }
};

// Makes the table of a bucket, on the host, and puts it into the kernel's own parameters from place
// *used on, or, if it is too long for that, into device memory that lasts until the kernels have
// run.
SegmentList place_segments(const std::vector<Segment>& segments, SegmentPiece* own, int* used,
                           const Stream& stream);

// The last of `count` segments that begins at or before i; the first begins at 0.
GMC_HD int find_segment(const TableSegment* segments, int count, uint32_t i) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (segments[middle].begin <= i) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace gmc::cuda
