#include <algorithm>

#include "launch.h"
#include "segments.h"

namespace gmc::cuda {
namespace {

__global__ void store_segments_kernel(const __grid_constant__ SegmentPiece piece, int count,
                                      TableSegment* stored) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) stored[i] = piece.segment[i];
}

// The table has no empty tensors, and neighbours in memory are joined (views of a flat buffer, or
// several Nones).
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

void store(const std::vector<TableSegment>& table, TableSegment* stored, const Stream& stream) {
  const int count = static_cast<int>(table.size());
  for (int first = 0; first < count; first += kInlineSegments) {
    SegmentPiece piece = {};
    const int length = std::min(count - first, kInlineSegments);
    std::copy_n(table.begin() + first, length, piece.segment);
    launch(store_segments_kernel, 1, 64, stream, piece, length, stored + first);
  }
}

}  // namespace

SegmentList place_segments(const std::vector<Segment>& segments, SegmentPiece* own, int* used,
                           const Stream& stream) {
  const std::vector<TableSegment> table = table_of(segments);
  const int count = static_cast<int>(table.size());
  if (*used + count <= kInlineSegments) {
    std::copy(table.begin(), table.end(), own->segment + *used);
    const int first = *used;
    *used += count;
    return {nullptr, first, count};
  }
  auto* const stored = static_cast<TableSegment*>(stream.allocate(count * sizeof(TableSegment)));
  store(table, stored, stream);
  return {stored, 0, count};
}

}  // namespace gmc::cuda
