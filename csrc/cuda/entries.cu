// What is done with the entries of one payload: giving a skipped step's payload back to memory,
// DGC's momentum factor masking, unpacking. A block owns one wire tile.
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

// Acts when there is no verdict, or when the step's being skipped is as when_skipped says.
template <class Format, class Action>
__global__ void __launch_bounds__(kThreads)
    entries_kernel(const __grid_constant__ PayloadSource source, Skip skip, bool when_skipped,
                   Action action) {
  if (skip.verdict && skip.skipped() != when_skipped) return;
  static __shared__ PayloadTile shared;
  for_each_entry<Format>(source, &shared, action);
}

__global__ void nonfinite_kernel(const uint8_t* payload, int64_t* nonfinite) {
  *nonfinite = read_header(payload).nonfinite;
}

template <class Action>
void act(const Payload& payload, const Skip& skip, bool when_skipped, const Action& action,
         const Stream& stream) {
  with_wire_type(payload.shape.wire, [&](auto format) {
    launch(entries_kernel<decltype(format), Action>, tile_count(payload.shape.numel), kThreads,
           stream, PayloadSource(payload), skip, when_skipped, action);
  });
}

}  // namespace

void run(const RestoreCall& call, const Stream& stream) {
  act(call.payload, call.skip, true, GiveBack{call.memory}, stream);
}

void run(const MaskCall& call, const Stream& stream) {
  act(call.payload, call.skip, false, Mask{call.momentum_buffer}, stream);
}

void run(const UnpackCall& call, const Stream& stream) {
  // A damaged payload raises on the CPU; here its damaged tiles keep index -1 and value 0.
  const int64_t k = call.payload.shape.k;
  check(cudaMemsetAsync(call.indices, 0xff, 8 * k, stream.stream));
  check(cudaMemsetAsync(call.values, 0, 4 * k, stream.stream));
  launch(nonfinite_kernel, 1, 1, stream, call.payload.data, call.nonfinite);
  act(call.payload, {}, false, Unpack{call.indices, call.values}, stream);
}

}  // namespace gmc::cuda
