// What is done with a rank's own payload: giving a skipped step's back to memory, DGC's momentum
// factor masking, unpacking. A block owns one wire tile and checks all of it before it acts.
#include "block.cuh"
#include "kernels.h"
#include "launch.h"
#include "payload_reader.cuh"
#include "rule.h"

namespace gmc::cuda {
namespace {

struct Restore {
  float* memory;
  __device__ void operator()(uint32_t, int64_t index, float value) const {
    memory[index] = add(memory[index], value);
  }
};

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
template <class Action>
__global__ void __launch_bounds__(kThreads)
    entries_kernel(Payload payload, const int32_t* skip, bool when_skipped, Action action) {
  if (skip && (*skip != 0) != when_skipped) return;
  const int64_t tile = blockIdx.x;
  const auto size = static_cast<uint32_t>(tile_size(payload.shape.numel, tile));
  PayloadTile entries;
  bool sound = open_tile(payload, 0, tile, &entries);
  for (uint32_t entry = threadIdx.x; entry < entries.count; entry += kThreads)
    sound &= entries.sound(entry, size);
  if (__syncthreads_or(!sound)) return;
  for (uint32_t entry = threadIdx.x; entry < entries.count; entry += kThreads)
    action(entries.start + entry, tile * kTile + entries.indices[entry], entries.value(entry));
}

}  // namespace

cudaError_t restore_launch(float* memory, const Payload& payload, const int32_t* skip,
                           cudaStream_t stream) {
  return launch(entries_kernel<Restore>, tile_count(payload.shape.numel), kThreads, stream, payload,
                skip, true, Restore{memory});
}

cudaError_t mask_launch(float* momentum_buffer, const Payload& payload, const int32_t* skip,
                        cudaStream_t stream) {
  return launch(entries_kernel<Mask>, tile_count(payload.shape.numel), kThreads, stream, payload,
                skip, false, Mask{momentum_buffer});
}

cudaError_t unpack_launch(const Payload& payload, int64_t* indices, float* values,
                          int64_t* nonfinite, cudaStream_t stream) {
  const Gathered alone{payload.data, 1, PayloadLayout(payload.shape).nbytes};
  const cudaError_t status = payload_nonfinite_launch(alone, nonfinite, stream);
  if (status != cudaSuccess) return status;
  return launch(entries_kernel<Unpack>, tile_count(payload.shape.numel), kThreads, stream, payload,
                static_cast<const int32_t*>(nullptr), false, Unpack{indices, values});
}

}  // namespace gmc::cuda
