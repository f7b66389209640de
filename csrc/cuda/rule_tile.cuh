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

// A sparse aggregate, and what it says of the run that a tile's entries are part of: in shared
// memory, known after the next barrier.
struct SparseMomentum {
  const AggregateSource& aggregate;
  const RunWords& run;
};

// Bit e of the result: element e of the bucket is not finite.
__device__ __forceinline__ uint32_t not_finite(const RuleTile& tile, const float (&v)[kPerThread]) {
  uint32_t mask = 0;
#pragma unroll
  for (int e = 0; e < kPerThread; ++e)
    mask |= static_cast<uint32_t>(!is_finite(v[e]) && tile.place(e) < tile.size) << e;
  return mask;
}

// Loads g' of a tile, which is zero everywhere after an overflow. loaded() is called while the
// loads are in flight. With kChecked, what is not finite becomes zero, and count() gets how many
// those are; without, it stays.
template <bool kChecked, class Function, class Count>
__device__ __forceinline__ void load_gradient(const RuleTile& tile, float (&g)[kPerThread],
                                              const Function& loaded, const Count& count) {
  const RuleArgs& args = tile.args;
  const bool overflowed = args.found_inf.load() != 0.0f;
  if (overflowed) {
    zero(g);
  } else {
    tile.load(args.grads, g);
  }
  if (!kChecked) loaded();
  const float factor = overflowed ? 0.0f : gradient_factor(args.grad_scale.load(), args.options);
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) g[e] = multiply(g[e], factor);
  if (!kChecked) return;
  count(__popc(not_finite(tile, g)));
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) g[e] = finite_or_zero(g[e]);
}

__device__ __forceinline__ void add_decay(const RuleTile& tile, float (&x)[kPerThread]) {
  float w[kPerThread];
  tile.load(tile.args.params, w);
#pragma unroll
  for (int e = 0; e < kPerThread; ++e)
    x[e] = add_scaled(x[e], tile.args.options.weight_decay, w[e]);
}

constexpr int kMomentumBatch = 2;  // entries of a thread that are loaded at once

// x += beta * a from the sparse aggregate.
__device__ __forceinline__ void add_momentum(const SparseMomentum& sparse, float momentum,
                                             const RuleTile& tile, float (&x)[kPerThread]) {
  if (!sparse.aggregate.data) return;
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) tile.stage[tile.place(e)] = 0.0f;
  __syncthreads();
  const EntryRange run = sparse.run.entries(sparse.aggregate);
  if (run.count == 0) return;
  const AggregateView<const uint8_t> view = sparse.aggregate.view();
  const uint32_t begin = tile.begin % kTile, end = run.begin + run.count;
#pragma unroll 1
  for (uint32_t first = run.begin + threadIdx.x; first < end; first += kMomentumBatch * kThreads) {
    uint32_t place[kMomentumBatch];
    float value[kMomentumBatch];
#pragma unroll
    for (int j = 0; j < kMomentumBatch; ++j) {
      const uint32_t entry = first + j * kThreads;
      place[j] = kWorkTile;
      if (entry >= end) continue;
      place[j] = view.indices[entry] - begin;  // huge for an entry before the tile
      value[j] = view.values[entry];
    }
#pragma unroll
    for (int j = 0; j < kMomentumBatch; ++j)
      if (place[j] < kWorkTile) tile.stage[place[j]] = multiply(momentum, value[j]);
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

// Whether all of v is finite, then. A sum of zeros tells it in one instruction an element;
// magnitudes would be kept in registers for the comparison with the guess.
__device__ __forceinline__ bool settle_tile(float (&v)[kPerThread]) {
  float zeros = 0.0f;
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) {
    v[e] = settle(v[e]);
    zeros = fmaf(v[e], 0.0f, zeros);
  }
  return zeros == 0.0f;
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
    tile.stage[place] = finite_or_zero(old[tile.begin + place]);
  }
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) x[e] = tile.stage[tile.place(e)];
}

// The rules. make() leaves v in registers and updates the momentum buffer; memory still holds u.
// aggregate: sparse or dense, as an overload of add_momentum takes it. All threads call loaded()
// once, while the loads of memory and gradient are in flight and before a barrier, and count(n)
// with the numbers of their values that are not finite.
//
// A gradient that is not finite shows in v. So the gradients are looked at one by one only where
// some v of the tile is not finite, and then the whole tile is made again.
//
// kBlocks: how many blocks must fit on a multiprocessor, which caps the registers. With 40
// registers the compiler still has all loads of a tile in flight before the first use; each further
// input takes 16 more.
template <bool kDecay>
struct GlobalMomentum {
  static constexpr int kBlocks = kDecay ? 4 : 5;

  template <class AnyAggregate, class Function, class Count>
  static __device__ __forceinline__ void make(const RuleTile& tile, const AnyAggregate& aggregate,
                                              float (&v)[kPerThread], const Function& loaded,
                                              const Count& count) {
    if (!__syncthreads_or(!sum<false>(tile, aggregate, v, loaded, count))) return;
    sum<true>(tile, aggregate, v, loaded, count);
    const uint32_t overflowed = not_finite(tile, v);
    count(__popc(overflowed));
    keep_old(tile, tile.args.memory, overflowed, v);
  }

 private:
  template <bool kChecked, class AnyAggregate, class Function, class Count>
  static __device__ __forceinline__ bool sum(const RuleTile& tile, const AnyAggregate& aggregate,
                                             float (&v)[kPerThread], const Function& loaded,
                                             const Count& count) {
    const RuleArgs& args = tile.args;
    float u[kPerThread];
    if (!kChecked) load_floats(args.memory, tile, u);
    load_gradient<kChecked>(tile, v, loaded, count);
    if (kChecked) load_floats(args.memory, tile, u);
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) v[e] = add(decayed(u[e], args.options), v[e]);
    if (kDecay) add_decay(tile, v);
    add_momentum(aggregate, args.momentum.load(), tile, v);
    return settle_tile(v);
  }
};

template <bool kDecay>
struct LocalMomentum {
  static constexpr int kBlocks = 3;

  template <class AnyAggregate, class Function, class Count>
  static __device__ __forceinline__ void make(const RuleTile& tile, const AnyAggregate&,
                                              float (&v)[kPerThread], const Function& loaded,
                                              const Count& count) {
    float m[kPerThread];
    if (__syncthreads_or(!sum<false>(tile, v, m, loaded, count))) {
      sum<true>(tile, v, m, loaded, count);
      const uint32_t overflowed = not_finite(tile, v);
      count(__popc(overflowed));
      keep_old(tile, tile.args.momentum_buffer, overflowed, m);
      keep_old(tile, tile.args.memory, overflowed, v);
    }
    store_floats(tile.args.momentum_buffer, tile, m);
  }

 private:
  template <bool kChecked, class Function, class Count>
  static __device__ __forceinline__ bool sum(const RuleTile& tile, float (&v)[kPerThread],
                                             float (&m)[kPerThread], const Function& loaded,
                                             const Count& count) {
    const RuleArgs& args = tile.args;
    float u[kPerThread];
    const auto load_both = [&] {
      load_floats(args.memory, tile, u);
      load_floats(args.momentum_buffer, tile, m);
    };
    if (!kChecked) load_both();
    load_gradient<kChecked>(tile, v, loaded, count);
    if (kDecay) add_decay(tile, v);
    if (kChecked) load_both();
    const float momentum = args.momentum.load();
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      m[e] = next_momentum(m[e], v[e], momentum);
      u[e] = decayed(u[e], args.options);
      v[e] = local_momentum_value(u[e], v[e], m[e], momentum, args.options);
    }
    return settle_tile(v);
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
