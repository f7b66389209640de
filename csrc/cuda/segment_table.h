// Making the table of a bucket's tensors, on the host.
#pragma once

#include <functional>
#include <vector>

#include "bucket.h"
#include "segments.h"

namespace gmc::cuda {

// Makes the table of a bucket and puts it into the kernel's own parameters from place *used on, or,
// if it is too long for that, into device memory that allocate(nbytes) gives and that must stay
// until the kernels have run.
cudaError_t place_segments(const std::vector<Segment>& segments, SegmentPiece* own, int* used,
                           const std::function<void*(int64_t)>& allocate, cudaStream_t stream,
                           SegmentList* list);

}  // namespace gmc::cuda
