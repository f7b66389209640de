#include <algorithm>

#include "launch.h"
#include "segments.h"

namespace gmc::cuda {
namespace {

__global__ void store_segments_kernel(const __grid_constant__ SegmentPiece piece, int count,
                                      Segment* stored) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) stored[i] = piece.segment[i];
}

}  // namespace

cudaError_t store_segments_launch(const Segment* segments, int count, Segment* stored,
                                  cudaStream_t stream) {
  for (int first = 0; first < count; first += kInlineSegments) {
    SegmentPiece piece = {};
    const int length = std::min(count - first, kInlineSegments);
    std::copy_n(segments + first, length, piece.segment);
    const cudaError_t status =
        launch(store_segments_kernel, 1, 64, stream, piece, length, stored + first);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace gmc::cuda
