// A work tile of a list of tensors, as float32.
#pragma once

#include "segments.h"
#include "tile.cuh"

namespace gmc::cuda {

__device__ __forceinline__ void zero(float (&x)[kPerThread]) {
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) x[e] = 0.0f;
}

// `data` is where the tile begins in a tensor, aligned to a quad.
__device__ __forceinline__ void load_quads(const void* data, DType dtype, const WorkTile& tile,
                                           float (&x)[kPerThread]) {
  if (dtype == DType::kFloat32) {
    const float* from = static_cast<const float*>(data) + 4 * threadIdx.x;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const float4 quad = __ldcs(reinterpret_cast<const float4*>(from + tile.step(4 * q)));
      x[4 * q] = quad.x;
      x[4 * q + 1] = quad.y;
      x[4 * q + 2] = quad.z;
      x[4 * q + 3] = quad.w;
    }
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(data) + 4 * threadIdx.x;
  uint2 quad[kQuads];
#pragma unroll
  for (int q = 0; q < kQuads; ++q)
    quad[q] = __ldcs(reinterpret_cast<const uint2*>(from + tile.step(4 * q)));
  const auto half = [&](int e) {
    const uint32_t word = e % 4 < 2 ? quad[e / 4].x : quad[e / 4].y;
    return static_cast<uint16_t>(word >> (16 * (e % 2)));
  };
  if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) x[e] = bf16_to_float(half(e));
  } else {
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) x[e] = fp16_to_float(half(e));
  }
}

// Tiles that hold one tensor's elements alone, aligned, take wide loads. The others (at tensors'
// ends, or of a tensor that lies askew) gather element by element, still coalesced, through
// `stage`, kWorkTile floats of shared memory. Elements past the end of the bucket read as zero.
__device__ __forceinline__ void load_segments(const Segment* segments, int count, int64_t numel,
                                              const WorkTile& tile, float* stage,
                                              float (&x)[kPerThread]) {
  const int first = find_segment(segments, count, tile.begin);
  const uint32_t end = tile.begin + tile.size;
  const int64_t first_end = first + 1 < count ? segments[first + 1].begin : numel;
  if (tile.full() && end <= first_end) {
    const Segment segment = segments[first];
    if (!segment.data) return zero(x);
    const int64_t nbytes = element_size(segment.dtype);
    const char* data = static_cast<const char*>(segment.data) +
                       static_cast<int64_t>(tile.begin - segment.begin) * nbytes;
    if (aligned(data, 4 * nbytes)) return load_quads(data, segment.dtype, tile, x);
  }
  const int candidates = find_segment(segments, count, end - 1) - first + 1;
  for (uint32_t place = threadIdx.x; place < kWorkTile; place += kThreads) {
    float value = 0.0f;
    if (place < tile.size) {
      const uint32_t i = tile.begin + place;
      const Segment segment = segments[first + find_segment(segments + first, candidates, i)];
      if (segment.data) value = load_value(segment.data, segment.dtype, i - segment.begin);
    }
    stage[place] = value;
  }
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) x[e] = stage[tile.place(e)];
  __syncthreads();  // before anyone uses the stage again
}

}  // namespace gmc::cuda
