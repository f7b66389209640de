// apply: w -= lr * a on the entries of an aggregate. It touches only the 32-byte sectors of the
// parameters that hold them. In a skipped step it gives this rank's payload back to memory instead.
#include "aggregate.cuh"
#include "args.h"
#include "launch.h"
#include "payload_reader.cuh"

namespace gmc::cuda {
namespace {

struct ApplyArgs {
  AggregateSource aggregate;
  MoveArgs move;
  float* memory;         // as in ApplyCall
  PayloadSource source;  // of its payload
};
static_assert(sizeof(ApplyArgs) <= kParameterLimit, "kernel parameters");

constexpr int kBatch = 4;  // entries of a thread whose parameters are loaded at once

// Moves the parameters of a tile that lies in one tensor. words: the tile's elements there. All
// loads of a batch are made without a branch between them, and none may sink below __syncwarp, to
// the branch that needs it.
template <class Format>
__device__ __forceinline__ void move_words(typename Format::Word* words, uint32_t size,
                                           const uint16_t* indices, const float* values,
                                           uint32_t count, float lr) {
  for (uint32_t first = 0; first < count; first += kBatch * kThreads) {
    uint32_t place[kBatch];
    float value[kBatch], weight[kBatch];
    bool present[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const uint32_t entry = first + threadIdx.x + j * kThreads;
      const uint32_t at = min(entry, count - 1);
      place[j] = indices[at];
      value[j] = values[at];
      present[j] = entry < count && place[j] < size;
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j)
      weight[j] = present[j] ? load_as<Format>(words, place[j]) : 0.0f;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kBatch; ++j)
      if (present[j]) store_as<Format>(words, place[j], moved(weight[j], lr, value[j]));
  }
}

// A block owns one wire tile.
__global__ void __launch_bounds__(kThreads) apply_kernel(const __grid_constant__ ApplyArgs args) {
  static __shared__ PayloadPiece own;
  const AggregateView<const uint8_t> view = args.aggregate.view();
  if (blockIdx.x == 0 && threadIdx.x == 0)
    args.move.skip.leave_behind(view.header->flags & kDamaged);
  // Asked for together; nothing may sink below __syncwarp.
  const TileWords words = TileWords::load(args.aggregate, blockIdx.x);
  const bool skipped = args.move.skip.skipped();
  __syncwarp();
  if (skipped) {
    if (!args.memory) return;
    with_wire_type(args.source.payload.shape.wire, [&](auto format) {
      for_each_entry<decltype(format)>(args.source, 0, &own, GiveBack{args.memory});
    });
    return;
  }
  const int64_t begin = blockIdx.x * kTile;
  const EntryRange entries = words.entries(args.aggregate);
  if (entries.count == 0) return;
  const uint16_t* const indices = view.indices + entries.begin;
  const float* const values = view.values + entries.begin;
  const float lr = args.move.lr.load();
  const TableSegment* segments = args.move.params.begin(args.move.own);
  const int total = args.move.params.count;
  // The tensors that share this tile.
  const auto size = static_cast<uint32_t>(tile_size(args.aggregate.numel, blockIdx.x));
  const int64_t last = begin + size - 1;
  const int first = find_segment(segments, total, static_cast<uint32_t>(begin));
  const int count = find_segment(segments, total, static_cast<uint32_t>(last)) - first + 1;
  if (count == 1) {
    const TableSegment& only = segments[first];
    with_dtype(only.dtype, [&](auto format) {
      using Format = decltype(format);
      auto* const words = static_cast<typename Format::Word*>(only.data) + (begin - only.begin);
      move_words<Format>(words, size, indices, values, entries.count, lr);
    });
    return;
  }
  for (uint32_t entry = threadIdx.x; entry < entries.count; entry += kThreads) {
    const int64_t i = begin + indices[entry];
    if (i > last) continue;
    const TableSegment segment =
        segments[first + find_segment(segments + first, count, static_cast<uint32_t>(i))];
    const int64_t place = i - segment.begin;
    const float weight = load_value(segment.data, segment.dtype, place);
    store_value(segment.data, segment.dtype, place, moved(weight, lr, values[entry]));
  }
}

}  // namespace

void run(const ApplyCall& call, const Stream& stream) {
  const ApplyArgs args{AggregateSource(call.aggregate, call.numel), MoveArgs(call.move, stream),
                       call.memory, PayloadSource(call.payload)};
  launch(apply_kernel, tile_count(call.numel), kThreads, stream, args);
}

}  // namespace gmc::cuda
