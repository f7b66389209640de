// The pass: v = u + g + ... over a whole bucket, once. It reads memory, the gradient and what else
// the rule needs, writes memory, counts what is not finite and puts candidates aside.
#include "compress.h"
#include "launch.h"
#include "momentum_tile.cuh"
#include "segment_tile.cuh"

namespace gmc::cuda {
namespace {

struct PassShared {
  CompactShared compact;
  alignas(16) float stage[kWorkTile];
};

// What a tile needs besides its elements.
struct Tile : WorkTile {
  const CompressArgs& args;
  float* stage;

  __device__ Tile(const CompressArgs& args, float* stage)
      : WorkTile(blockIdx.x, args.numel), args(args), stage(stage) {}

  __device__ void load_params(float (&w)[kPerThread]) const {
    load_segments(args.params.begin(args.own), args.params.count, args.numel, *this, stage, w);
  }
};

__device__ __forceinline__ float finite_or_zero(float x) { return finite(x) ? x : 0.0f; }

// g' = g / grad_scale, zero where that is not finite, or everywhere after an overflow.
__device__ __forceinline__ void load_gradient(const Tile& tile, float (&g)[kPerThread],
                                              uint32_t* nonfinite) {
  const CompressArgs& args = tile.args;
  if (args.found_inf.load() != 0.0f) return zero(g);
  load_segments(args.grads.begin(args.own), args.grads.count, args.numel, tile, tile.stage, g);
  const float inverse = __fdiv_rn(1.0f, args.grad_scale.load());
  const float factor = args.maximize ? -inverse : inverse;
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) {
    g[e] = __fmul_rn(g[e], factor);
    *nonfinite += !finite(g[e]);
    g[e] = finite_or_zero(g[e]);
  }
}

__device__ __forceinline__ void add_decay(const Tile& tile, float (&x)[kPerThread]) {
  float w[kPerThread];
  tile.load_params(w);
#pragma unroll
  for (int e = 0; e < kPerThread; ++e)
    x[e] = __fadd_rn(x[e], __fmul_rn(tile.args.weight_decay, w[e]));
}

// Adding +0 turns -0 into +0, so that an aggregate's missing entries equal entries of zero.
// Bit e of the result: element e is not finite.
__device__ __forceinline__ uint32_t settle(float (&v)[kPerThread]) {
  uint32_t overflowed = 0;
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) {
    v[e] = __fadd_rn(v[e], 0.0f);
    overflowed |= static_cast<uint32_t>(!finite(v[e])) << e;
  }
  return overflowed;
}

// x = finite_or_zero(old) for the elements in `which`: those where v overflowed, so old is still in
// place. It is rare, so it goes one by one through the thread's own places in shared memory: 16
// copies of it would cost the registers that the common path needs.
__device__ __forceinline__ void keep_old(const Tile& tile, const float* old, uint32_t which,
                                         float (&x)[kPerThread]) {
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) tile.stage[tile.place(e)] = x[e];
  for (; which; which &= which - 1) {
    const uint32_t place = tile.place(__ffs(which) - 1);
    tile.stage[place] = place < tile.size ? finite_or_zero(old[tile.begin + place]) : 0.0f;
  }
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) x[e] = tile.stage[tile.place(e)];
}

// v = ((u + g') + weight_decay * w) + beta * a
template <bool kDecay>
struct GlobalMomentum {
  static __device__ __forceinline__ void accumulate(const Tile& tile, float (&v)[kPerThread],
                                                    uint32_t* nonfinite) {
    const CompressArgs& args = tile.args;
    float u[kPerThread];
    load_floats(args.memory, tile, u);
    load_gradient(tile, v, nonfinite);
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) v[e] = __fadd_rn(u[e], v[e]);
    if (kDecay) add_decay(tile, v);
    add_global_momentum(args.aggregate, args.momentum.load(), args.numel, tile, tile.stage, v);
    const uint32_t overflowed = settle(v);
    if (overflowed) {
      *nonfinite += __popc(overflowed);
      keep_old(tile, args.memory, overflowed, v);
    }
  }
};

// g'' = g' + weight_decay * w, m = beta * m + g'', v = u + m or (u + g'') + beta * m
template <bool kDecay>
struct LocalMomentum {
  static __device__ __forceinline__ void accumulate(const Tile& tile, float (&v)[kPerThread],
                                                    uint32_t* nonfinite) {
    const CompressArgs& args = tile.args;
    float u[kPerThread], m[kPerThread];
    load_floats(args.memory, tile, u);
    load_floats(args.momentum_buffer, tile, m);
    load_gradient(tile, v, nonfinite);
    if (kDecay) add_decay(tile, v);
    const float momentum = args.momentum.load();
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      m[e] = __fadd_rn(__fmul_rn(momentum, m[e]), v[e]);
      v[e] = args.nesterov ? __fadd_rn(__fadd_rn(u[e], v[e]), __fmul_rn(momentum, m[e]))
                           : __fadd_rn(u[e], m[e]);
    }
    const uint32_t overflowed = settle(v);
    if (overflowed) {
      *nonfinite += __popc(overflowed);
      keep_old(tile, args.momentum_buffer, overflowed, m);
      keep_old(tile, args.memory, overflowed, v);
    }
    store_floats(args.momentum_buffer, tile, m);
  }
};

// How many blocks must fit on a multiprocessor, which caps the registers. With 40 registers the
// compiler still has all loads of a tile in flight before the first use; each further input takes
// 16 more.
template <class Rule>
constexpr int kBlocks = 4;
template <>
constexpr int kBlocks<GlobalMomentum<false>> = 5;
template <>
constexpr int kBlocks<LocalMomentum<false>> = 3;
template <>
constexpr int kBlocks<LocalMomentum<true>> = 3;

template <class Rule>
__global__ void __launch_bounds__(kThreads, kBlocks<Rule>)
    pass_kernel(const __grid_constant__ CompressArgs args) {
  static __shared__ PassShared shared;
  const Tile tile(args, shared.stage);
  const Workspace& workspace = args.workspace;
  const uint32_t guess = workspace.control->guess;
  uint32_t nonfinite = 0;
  float v[kPerThread];
  Rule::accumulate(tile, v, &nonfinite);
  store_floats(args.memory, tile, v);
  add_to_counter(&workspace.control->nonfinite, nonfinite);
  if (guess == 0) return;  // nothing is known: the repair finds candidates
  const uint32_t mask = reaching(tile, v, guess);
  const Compaction compaction =
      reserve(tile, mask, &workspace.control->found, workspace, &shared.compact);
  store_candidates(tile, mask, v, guess, compaction, workspace, workspace.pass_bins);
}

template <class Rule>
cudaError_t launch_rule(const CompressArgs& args, cudaStream_t stream) {
  return launch(pass_kernel<Rule>, work_tile_count(args.numel), kThreads, stream, args);
}

}  // namespace

cudaError_t pass_launch(const CompressArgs& args, cudaStream_t stream) {
  const bool decay = args.params.count != 0;
  if (args.momentum_buffer)
    return decay ? launch_rule<LocalMomentum<true>>(args, stream)
                 : launch_rule<LocalMomentum<false>>(args, stream);
  return decay ? launch_rule<GlobalMomentum<true>>(args, stream)
               : launch_rule<GlobalMomentum<false>>(args, stream);
}

}  // namespace gmc::cuda
