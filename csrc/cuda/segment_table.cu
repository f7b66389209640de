#include <algorithm>

#include "launch.h"
#include "segment_table.h"

namespace gmc::cuda {
namespace {

__global__ void store_segments_kernel(const __grid_constant__ SegmentPiece piece, int count,
                                      TableSegment* stored) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) stored[i] = piece.segment[i];
}

// Without empty tensors, and with neighbours in one run joined (a flat buffer's views, or several
// Nones).
std::vector<TableSegment> table_of(const std::vector<Segment>& segments) {
  std::vector<TableSegment> table;
  for (const Segment& segment : segments) {
    if (segment.numel == 0) continue;
    const auto begin = static_cast<uint32_t>(segment.begin);
    if (!table.empty() && table.back().dtype == segment.dtype) {
      const TableSegment& last = table.back();
      const auto* end =
          static_cast<const char*>(last.data) + (begin - last.begin) * element_size(last.dtype);
      if (last.data ? end == segment.data : !segment.data) continue;
    }
    table.push_back({segment.data, begin, segment.dtype});
  }
  return table;
}

cudaError_t store(const std::vector<TableSegment>& table, TableSegment* stored,
                  cudaStream_t stream) {
  const int count = static_cast<int>(table.size());
  for (int first = 0; first < count; first += kInlineSegments) {
    SegmentPiece piece = {};
    const int length = std::min(count - first, kInlineSegments);
    std::copy_n(table.begin() + first, length, piece.segment);
    const cudaError_t status =
        launch(store_segments_kernel, 1, 64, stream, piece, length, stored + first);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t place_segments(const std::vector<Segment>& segments, SegmentPiece* own, int* used,
                           const std::function<void*(int64_t)>& allocate, cudaStream_t stream,
                           SegmentList* list) {
  const std::vector<TableSegment> table = table_of(segments);
  const int count = static_cast<int>(table.size());
  if (*used + count <= kInlineSegments) {
    std::copy(table.begin(), table.end(), own->segment + *used);
    *list = {nullptr, *used, count};
    *used += count;
    return cudaSuccess;
  }
  auto* stored = static_cast<TableSegment*>(allocate(count * sizeof(TableSegment)));
  *list = {stored, 0, count};
  return store(table, stored, stream);
}

}  // namespace gmc::cuda
