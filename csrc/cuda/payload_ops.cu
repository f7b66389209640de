// What is done with a rank's own payload: giving a skipped step's back to memory, DGC's momentum
// factor masking, unpacking. A block owns one wire tile.
#include "kernels.h"
#include "launch.h"
#include "payload_reader.cuh"

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

// Runs when there is no skip, or when (*skip != 0) == when_skipped.
template <class Format, class Action>
__global__ void __launch_bounds__(kThreads)
    entries_kernel(const __grid_constant__ PayloadSource source, const int32_t* skip,
                   bool when_skipped, Action action) {
  if (skip && (*skip != 0) != when_skipped) return;
  static __shared__ PayloadTile shared;
  for_each_entry<Format>(source, &shared, action);
}

template <class Action>
cudaError_t entries_launch(const Payload& payload, const int32_t* skip, bool when_skipped,
                           const Action& action, cudaStream_t stream) {
  return with_wire_type(payload.shape.wire, [&](auto format) {
    return launch(entries_kernel<decltype(format), Action>, tile_count(payload.shape.numel),
                  kThreads, stream, PayloadSource(payload), skip, when_skipped, action);
  });
}

}  // namespace

cudaError_t restore_launch(float* memory, const Payload& payload, const int32_t* skip,
                           cudaStream_t stream) {
  return entries_launch(payload, skip, true, GiveBack{memory}, stream);
}

cudaError_t mask_launch(float* momentum_buffer, const Payload& payload, const int32_t* skip,
                        cudaStream_t stream) {
  return entries_launch(payload, skip, false, Mask{momentum_buffer}, stream);
}

cudaError_t unpack_launch(const Payload& payload, int64_t* indices, float* values,
                          int64_t* nonfinite, cudaStream_t stream) {
  const Gathered alone{payload.data, 1, PayloadLayout(payload.shape).nbytes};
  const cudaError_t status = payload_nonfinite_launch(alone, nonfinite, stream);
  if (status != cudaSuccess) return status;
  return entries_launch(payload, nullptr, false, Unpack{indices, values}, stream);
}

}  // namespace gmc::cuda
