// What is done with the entries of payloads: giving a skipped step's payloads back to memory, DGC's
// momentum factor masking, unpacking. A block owns one wire tile of the payload of range
// blockIdx.y.
#include "launch.h"
#include "payload_reader.cuh"
#include "shared/calls.h"

namespace gmc::cuda {
namespace {

struct Mask {
  float* momentum_buffer;
  __device__ void operator()(uint32_t, int64_t index, float value) const {
    if (value != 0.0f) momentum_buffer[index] = 0.0f;
  }
};

struct Unpack {
  int64_t* indices;
  float* values;
  __device__ void operator()(uint32_t position, int64_t index, float value) const {
    indices[position] = index;
    values[position] = value;
  }
};

// Acts when there is no verdict, or when the step's being skipped is as when_skipped says;
// by_range: as each range's own verdict says.
template <class Format, class Action>
__global__ void __launch_bounds__(kThreads)
    entries_kernel(const __grid_constant__ PayloadSource full,
                   const __grid_constant__ PayloadSource last, const int32_t* verdict,
                   bool by_range, bool when_skipped, Action action) {
  if (verdict && (verdict[by_range ? blockIdx.y : 0] != 0) != when_skipped) return;
  static __shared__ PayloadPiece shared;
  const bool is_last = blockIdx.y + 1 == gridDim.y;
  const PayloadSource& source = is_last ? last : full;
  if (blockIdx.x >= tile_count(source.payload.shape.numel)) return;  // the last range is shorter
  const int64_t begin = blockIdx.y * full.payload.shape.numel;
  for_each_entry<Format>(source, is_last ? 0 : blockIdx.y, &shared,
                         [&](uint32_t position, int64_t index, float value) {
                           action(position, begin + index, value);
                         });
}

__global__ void nonfinite_kernel(const uint8_t* payload, int64_t* nonfinite) {
  *nonfinite = read_header(payload).nonfinite;
}

template <class Action>
void act(const uint8_t* payloads, const Ranges& ranges, const Skip& skip, bool by_range,
         bool when_skipped, const Action& action, const Stream& stream) {
  with_wire_type(ranges.full.wire, [&](auto format) {
    launch(entries_kernel<decltype(format), Action>, {tile_count(ranges.width()), ranges.count},
           kThreads, stream, PayloadSource({payloads, ranges.full}),
           PayloadSource(ranges.payload(payloads, ranges.count - 1)), skip.verdict, by_range,
           when_skipped, action);
  });
}

}  // namespace

void run(const RestoreCall& call, const Stream& stream) {
  act(call.payloads, call.ranges, call.skip, call.by_range, true, GiveBack{call.memory}, stream);
}

void run(const MaskCall& call, const Stream& stream) {
  act(call.payloads, call.ranges, call.skip, false, false, Mask{call.momentum_buffer}, stream);
}

void run(const UnpackCall& call, const Stream& stream) {
  // A damaged payload raises on the CPU; here its damaged tiles keep index -1 and value 0.
  const int64_t k = call.payload.shape.k;
  check(cudaMemsetAsync(call.indices, 0xff, 8 * k, stream.stream));
  check(cudaMemsetAsync(call.values, 0, 4 * k, stream.stream));
  launch(nonfinite_kernel, 1, 1, stream, call.payload.data, call.nonfinite);
  act(call.payload.data, uncut(call.payload.shape), {}, false, false,
      Unpack{call.indices, call.values}, stream);
}

}  // namespace gmc::cuda
