// v of a work tile: the rule (rule.h) over what compress and accumulate read.
#pragma once

#include "aggregate.cuh"
#include "args.h"
#include "shared/rule.h"
#include "tile.cuh"

namespace gmc::cuda {

// What a tile needs besides its elements. stage: kWorkTile floats of shared memory.
struct RuleTile : WorkTile {
  const RuleArgs& args;
  float* stage;

  __device__ RuleTile(const RuleArgs& args, const WorkTile& tile, float* stage)
      : WorkTile(tile), args(args), stage(stage) {}

  __device__ void load(const SegmentList& list, float (&x)[kPerThread]) const {
    load_segments(list.begin(args.own), list.count, args.numel, *this, stage, x);
  }
};

// Loads g' of a tile, which is zero everywhere after an overflow. loaded() is called while the
// loads are in flight.
template <class Function>
__device__ __forceinline__ void load_gradient(const RuleTile& tile, float (&g)[kPerThread],
                                              uint32_t* nonfinite, const Function& loaded) {
  const RuleArgs& args = tile.args;
  const bool overflowed = args.found_inf.load() != 0.0f;
  if (overflowed) {
    zero(g);
  } else {
    tile.load(args.grads, g);
  }
  loaded();
  const float factor = overflowed ? 0.0f : gradient_factor(args.grad_scale.load(), args.options);
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) g[e] = scaled_gradient(g[e], factor, nonfinite);
}

__device__ __forceinline__ void add_decay(const RuleTile& tile, float (&x)[kPerThread]) {
  float w[kPerThread];
  tile.load(tile.args.params, w);
#pragma unroll
  for (int e = 0; e < kPerThread; ++e)
    x[e] = add_scaled(x[e], tile.args.options.weight_decay, w[e]);
}

// x += beta * a from the sparse aggregate, whose entries of this tile are part of one run.
__device__ __forceinline__ void add_momentum(const Aggregate& aggregate, float momentum,
                                             const RuleTile& tile, float (&x)[kPerThread]) {
  const AggregateEntries entries =
      aggregate_run(aggregate, tile.args.numel, tile.begin / kAggregateRun);
  if (entries.count == 0) return;
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) tile.stage[tile.place(e)] = 0.0f;
  __syncthreads();
  const uint32_t begin = tile.begin % kTile;
  for (uint32_t entry = threadIdx.x; entry < entries.count; entry += kThreads) {
    const uint32_t place = entries.indices[entry] - begin;  // huge for an entry before the tile
    if (place < kWorkTile) tile.stage[place] = multiply(momentum, entries.values[entry]);
  }
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) x[e] = add(x[e], tile.stage[tile.place(e)]);
}

// x += beta * a from the aggregate of a dense bucket.
__device__ __forceinline__ void add_momentum(const float* aggregate, float momentum,
                                             const RuleTile& tile, float (&x)[kPerThread]) {
  if (!aggregate) return;
  float a[kPerThread];
  load_floats(aggregate, tile, a);
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) x[e] = add_scaled(x[e], momentum, a[e]);
}

// Bit e of the result: element e is not finite.
__device__ __forceinline__ uint32_t settle_tile(float (&v)[kPerThread]) {
  uint32_t overflowed = 0;
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) {
    v[e] = settle(v[e]);
    overflowed |= static_cast<uint32_t>(!is_finite(v[e])) << e;
  }
  return overflowed;
}

// x = finite_or_zero(old) for the elements in `which`: those where v overflowed, so old is still in
// place. This is rare, so it goes one by one through the thread's own places in shared memory,
// because 16 copies of it would cost the registers that the common path needs.
__device__ __forceinline__ void keep_old(const RuleTile& tile, const float* old, uint32_t which,
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

// The rules. make() leaves v in registers and updates the momentum buffer; memory still holds u.
// aggregate: sparse or dense, as an overload of add_momentum takes it. loaded() is called once, by
// all threads, while the loads of memory and gradient are in flight.
//
// kBlocks: how many blocks must fit on a multiprocessor, which caps the registers. With 40
// registers the compiler still has all loads of a tile in flight before the first use; each further
// input takes 16 more.
template <bool kDecay>
struct GlobalMomentum {
  static constexpr int kBlocks = kDecay ? 4 : 5;

  template <class AnyAggregate, class Function>
  static __device__ __forceinline__ void make(const RuleTile& tile, const AnyAggregate& aggregate,
                                              float (&v)[kPerThread], uint32_t* nonfinite,
                                              const Function& loaded) {
    const RuleArgs& args = tile.args;
    float u[kPerThread];
    load_floats(args.memory, tile, u);
    load_gradient(tile, v, nonfinite, loaded);
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) v[e] = add(decayed(u[e], args.options), v[e]);
    if (kDecay) add_decay(tile, v);
    add_momentum(aggregate, args.momentum.load(), tile, v);
    const uint32_t overflowed = settle_tile(v);
    if (overflowed) {
      *nonfinite += __popc(overflowed);
      keep_old(tile, args.memory, overflowed, v);
    }
  }
};

template <bool kDecay>
struct LocalMomentum {
  static constexpr int kBlocks = 3;

  template <class AnyAggregate, class Function>
  static __device__ __forceinline__ void make(const RuleTile& tile, const AnyAggregate&,
                                              float (&v)[kPerThread], uint32_t* nonfinite,
                                              const Function& loaded) {
    const RuleArgs& args = tile.args;
    float u[kPerThread], m[kPerThread];
    load_floats(args.memory, tile, u);
    load_floats(args.momentum_buffer, tile, m);
    load_gradient(tile, v, nonfinite, loaded);
    if (kDecay) add_decay(tile, v);
    const float momentum = args.momentum.load();
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      m[e] = next_momentum(m[e], v[e], momentum);
      u[e] = decayed(u[e], args.options);
      v[e] = local_momentum_value(u[e], v[e], m[e], momentum, args.options);
    }
    const uint32_t overflowed = settle_tile(v);
    if (overflowed) {
      *nonfinite += __popc(overflowed);
      keep_old(tile, args.momentum_buffer, overflowed, m);
      keep_old(tile, args.memory, overflowed, v);
    }
    store_floats(args.momentum_buffer, tile, m);
  }
};

// Calls function(rule) with the rule that the arguments select.
template <class Function>
void with_rule(const RuleArgs& args, const Function& function) {
  const bool decay = args.params.count != 0;
  if (args.momentum_buffer)
    return decay ? function(LocalMomentum<true>{}) : function(LocalMomentum<false>{});
  return decay ? function(GlobalMomentum<true>{}) : function(GlobalMomentum<false>{});
}

}  // namespace gmc::cuda
