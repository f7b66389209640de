// Exact selection of the k largest magnitudes, ties to the lowest index, and the payload.
//
//   refine  which bin holds the k-th largest key; a histogram of the keys in that bin; zeros for
//           the sections of the payload that emit sets bits in
//   count   the k-th largest key itself; per work tile, how many entries lie above it and equal it;
//           for 8- and 4-bit values a histogram of the exponents above it
//   emit    the payload in index order; residual to memory; guess and workspace for the next call
//
// Entries are the candidates of the pass, those of the repair, or all of memory: flags say which.
// Where fewer than k values are not zero, the k-th key is zero: the pass's candidates lie above it,
// and zeros, which are no candidates, are the ties.
#include <new>

#include "block.cuh"
#include "compress.h"
#include "launch.h"
#include "shared/rule.h"
#include "tile.cuh"

namespace gmc::cuda {
namespace {

// One work tile's entries, in index order: index and value's bits.
struct Entries {
  const OwnSelection& args;
  bool from_memory;
  uint32_t begin, count;

  // place: of its candidates, as `tiles` has it.
  __device__ Entries(const OwnSelection& args, bool from_memory, const WorkTile& tile, uint2 place)
      : args(args),
        from_memory(from_memory),
        begin(from_memory ? tile.begin : place.x),
        count(from_memory ? tile.size : place.y) {}

  __device__ uint2 at(uint32_t i) const {
    i += begin;
    return from_memory ? make_uint2(i, float_bits(args.memory[i])) : args.workspace.candidates[i];
  }
};

__device__ __forceinline__ uint32_t key_of(uint2 entry) { return entry.y & kKeyMask; }

// A warp goes through the keys of its tiles among the block's: each lane calls meet(key) for its
// keys of a tile, and all call after(number, how many entries). Where entries are is asked for 32
// tiles at once, and a lane's first keys one tile ahead.
template <bool kFromMemory, class Meet, class After>
__device__ __forceinline__ void for_each_key(const OwnSelection& args, const Meet& meet,
                                             const After& after) {
  constexpr uint32_t kAhead = 2;  // keys of a lane: all of a tile at 1 %, as a rule
  using Keys = uint32_t[kAhead];
  const uint32_t end = args.groups.first_tile(blockIdx.x + 1);
  const auto bits = [&](uint2 entries, uint32_t i) {
    i += entries.x;
    return kFromMemory ? float_bits(args.memory[i]) : args.workspace.candidates[i].y;
  };
  uint32_t t = args.groups.first_tile(blockIdx.x) + warp_id(), turn = 0;
  uint2 entries, places;  // which is a tile's first entry, and how many it has; places: a tile each
  const auto load = [&](uint32_t tile, Keys& keys) {
    if (turn % 32 == 0) {
      const WorkTile own(min(tile + lane_id() * kWarps, end - 1), args.shape.numel);
      places = kFromMemory ? make_uint2(own.begin, own.size) : args.workspace.tiles[own.number];
    }
    const uint2 next = make_uint2(__shfl_sync(kAllLanes, places.x, turn % 32),
                                  __shfl_sync(kAllLanes, places.y, turn % 32));
    ++turn;
#pragma unroll
    for (uint32_t j = 0; j < kAhead; ++j)
      if (lane_id() + 32 * j < next.y) keys[j] = bits(next, lane_id() + 32 * j);
    return next;
  };
  const auto work = [&](const Keys& keys, Keys& next_keys) {
    const uint2 next = load(t + kWarps, next_keys);
#pragma unroll
    for (uint32_t j = 0; j < kAhead; ++j)
      if (lane_id() + 32 * j < entries.y) meet(keys[j] & kKeyMask);
#pragma unroll 1
    for (uint32_t i = lane_id() + 32 * kAhead; i < entries.y; i += 32)
      meet(bits(entries, i) & kKeyMask);
    after(t, entries.y);
    entries = next;
    t += kWarps;
  };
  if (t >= end) return;
  Keys even, odd;  // by turns, because a copy would wait for what is on its way
  entries = load(t, even);
  while (t < end) {
    work(even, odd);
    if (t < end) work(odd, even);
  }
}

template <class Meet, class After>
__device__ __forceinline__ void for_each_key(const OwnSelection& args, bool from_memory,
                                             const Meet& meet, const After& after) {
  return from_memory ? for_each_key<true>(args, meet, after)
                     : for_each_key<false>(args, meet, after);
}

// Sets the bits that emit adds to, and what no section owns, to zero. Sections begin at multiples
// of 16 bytes, so what is between two of them is shorter than a block.
__device__ __forceinline__ void clear_payload(const OwnSelection& args) {
  const PayloadLayout& layout = args.layout;
  const bool values = args.shape.wire == WireType::kFloat4;
  const int64_t begin = layout.bitmap, end = values ? layout.nbytes : layout.values;
  const int64_t step = 16 * static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t at = begin + 16 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
#pragma unroll 1
  for (; at < end; at += step)
    *reinterpret_cast<uint4*>(args.payload + at) = make_uint4(0, 0, 0, 0);
  if (blockIdx.x != 0) return;
  layout.for_each_gap([&](int64_t from, int64_t to) {
    if ((from < begin || from >= end) && from + threadIdx.x < to)
      args.payload[from + threadIdx.x] = 0;
  });
}

struct RefineShared {
  FindShared<> find;
  uint32_t bins[kBins];
};

__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    refine_kernel(const __grid_constant__ SelectArgs all) {
  static __shared__ RefineShared shared;
  const OwnSelection args(all);
  const Workspace& workspace = args.workspace;
  Control* control = workspace.control;
  start_next();
  clear_payload(args);
  if (blockIdx.x == 0) clear_bins<kFields>(workspace.field_bins);
  clear_bins<kBins>(shared.bins);
  wait_for_previous();
  const Outcome outcome = control->outcome;
  if (outcome == kFewValues) return;
  const bool from_memory = control->from_memory;
  const FoundBin found = find_bin<kBins>(
      outcome == kUseful ? workspace.pass_bins : workspace.repair_bins, args.shape.k, &shared.find);
  const uint32_t bin_key = control->base + (found.bin << kBinBits);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    control->bin_key = bin_key;
    control->above_bin = found.above;
  }
  for_each_key(
      args, from_memory,
      [&](uint32_t key) {
        const uint32_t low = key - bin_key;
        if (low < kBins) atomicAdd(&shared.bins[low], 1u);
      },
      [](uint32_t, uint32_t) {});
  __syncthreads();
  flush_bins<kBins>(shared.bins, workspace.low_bins);
}

struct CountShared {
  FindShared<> find;
  unsigned long long warp_sums[kWarps];
  uint32_t fields[kFields];
};

__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    count_kernel(const __grid_constant__ SelectArgs all) {
  static __shared__ CountShared shared;
  const OwnSelection args(all);
  const Workspace& workspace = args.workspace;
  Control* control = workspace.control;
  const bool scaled = is_scaled(args.shape.wire);
  start_next();
  clear_bins<kFields>(shared.fields);
  wait_for_previous();
  const bool few = control->outcome == kFewValues;
  const uint32_t wanted =
      static_cast<uint32_t>(args.shape.k) - (few ? control->found : control->above_bin);
  const FoundBin found = find_bin<kBins>(workspace.low_bins, wanted, &shared.find);
  const uint32_t threshold = few ? 0 : control->bin_key + found.bin;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    control->threshold = threshold;
    control->ties = few ? wanted : wanted - found.above;
  }
  unsigned long long sum = 0;  // entries above << 32 | ties, in lane 0
  uint32_t met = 0;            // in a tile, above << 16 | ties
  for_each_key(
      args, control->from_memory,
      [&](uint32_t key) {
        met += key > threshold ? 1u << 16 : key == threshold;
        if (scaled && key > threshold) atomicAdd(&shared.fields[exponent_field(key)], 1u);
      },
      [&](uint32_t t, uint32_t entries) {
        met = __reduce_add_sync(kAllLanes, met);
        if (lane_id() == 0) {
          if (few) met += WorkTile(t, args.shape.numel).size - entries;
          workspace.selected[t] = met;
          sum += static_cast<unsigned long long>(met >> 16) << 32 | (met & 0xffffu);
        }
        met = 0;
      });
  if (lane_id() == 0) shared.warp_sums[warp_id()] = sum;
  __syncthreads();
  if (scaled) flush_bins<kFields>(shared.fields, workspace.field_bins);
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kWarps; ++warp) sum += shared.warp_sums[warp];
    workspace.groups[blockIdx.x] = sum;
  }
}

// How many of the entries met so far are taken: above << 32 | ties, of which the first are taken.
__device__ __forceinline__ uint32_t taken(unsigned long long met, uint32_t ties) {
  return static_cast<uint32_t>(met >> 32) + min(static_cast<uint32_t>(met), ties);
}

// Sets each lane's bits in its word, with one atomic for all lanes that share a word, and none
// where there are no bits.
__device__ __forceinline__ void set_bits(uint8_t* section, uint32_t word, uint32_t bits) {
  const unsigned sharing = __match_any_sync(kAllLanes, word);
  const uint32_t all = __reduce_or_sync(sharing, bits);
  if (all != 0 && (sharing & lanes_below()) == 0) atomicOr(at<uint32_t>(section, 0) + word, all);
}

// What is the same for all tiles.
struct EmitPlan {
  uint32_t threshold, ties;
  int32_t scale;
  bool few, from_memory, taken_out;
  bool as_expected;  // taken out for this scale
};

// Writes what a warp's tile contributes to the payload.
template <class Format>
__device__ __forceinline__ void emit_tile(const OwnSelection& args, const EmitPlan& plan,
                                          uint32_t number, uint2 place, unsigned long long met) {
  const PayloadView<uint8_t>& out = args.out;
  const uint32_t threshold = plan.threshold, ties = plan.ties;
  const int scale = plan.scale;
  const WorkTile tile(number, args.shape.numel);
  bool from_memory = plan.from_memory, taken_out = plan.taken_out;
  if (plan.few && static_cast<uint32_t>(met) < ties) {
    // Zeros of this tile are taken, so its other values go back to memory beside them.
    const Entries values(args, false, tile, place);
    for (uint32_t i = lane_id(); i < values.count; i += 32)
      args.memory[values.at(i).x] = bits_float(values.at(i).y);
    __syncwarp();
    from_memory = true;
    taken_out = false;
  }
  const bool as_expected = taken_out && plan.as_expected;
  const Entries entries(args, from_memory, tile, place);
  for (uint32_t first = 0; first < entries.count; first += 32) {
    const bool present = first + lane_id() < entries.count;
    const uint2 entry = present ? entries.at(first + lane_id()) : make_uint2(0, 0);
    const bool above = present && key_of(entry) > threshold;
    const bool tie = present && key_of(entry) == threshold;
    const unsigned all_above = __ballot_sync(kAllLanes, above);
    const unsigned all_ties = __ballot_sync(kAllLanes, tie);
    const unsigned long long before =
        met + (static_cast<unsigned long long>(__popc(all_above & lanes_below())) << 32) +
        __popc(all_ties & lanes_below());
    const bool selected = above || (tie && static_cast<uint32_t>(before) < ties);
    const uint32_t position = taken(before, ties);
    const uint32_t bit = position + entry.x / static_cast<uint32_t>(kBlock);
    uint32_t code = 0;
    if (selected) {
      const float value = bits_float(entry.y);
      code = Format::encode(value, scale);
      if (!as_expected) args.memory[entry.x] = subtract(value, Format::decode(code, scale));
      out.low[position] = static_cast<uint8_t>(entry.x % kBlock);
      if constexpr (Format::kBits >= 8) store_code<Format>(out.values, position, code);
    } else if (present && taken_out) {
      args.memory[entry.x] = bits_float(entry.y);
    }
    set_bits(out.bitmap, selected ? bit / 32 : ~0u, selected ? 1u << bit % 32 : 0);
    if constexpr (Format::kBits < 8) {
      constexpr uint32_t kEach = 32 / Format::kBits;
      set_bits(out.values, selected ? position / kEach : ~0u,
               code << position % kEach * Format::kBits);
    }
    met += (static_cast<unsigned long long>(__popc(all_above)) << 32) + __popc(all_ties);
  }
}

struct EmitShared {
  // An OwnSelection, shared because no thread has registers to spare.
  alignas(OwnSelection) unsigned char own[sizeof(OwnSelection)];
  EmitPlan plan;
  FindShared<> largest, fitting;
  unsigned long long warp_sums[kWarps];
  unsigned long long next_warp_sums[kWarps];
  unsigned long long met[kScanTiles];
  uint2 place[kScanTiles];
};

template <class Format>
__global__ void __launch_bounds__(kThreads, kResidentBlocks)
    emit_kernel(const __grid_constant__ SelectArgs all) {
  static __shared__ EmitShared shared;
  if (threadIdx.x == 0) new (shared.own) OwnSelection(all);
  __syncthreads();
  const OwnSelection& args = *reinterpret_cast<const OwnSelection*>(shared.own);
  const Workspace& workspace = args.workspace;
  const PayloadView<uint8_t>& out = args.out;
  wait_for_previous();
  int scale = 0;
  if constexpr (Format::kScaled) {
    // The selected entries that are not above the threshold equal it.
    const uint32_t lowest = exponent_field(workspace.control->threshold);
    const auto exceeded = [&](int64_t by, FindShared<>* find) {
      const auto next = static_cast<uint32_t>(by + 1);
      return max(lowest, find_bin<kFields>(workspace.field_bins, next, find).bin);
    };
    const uint32_t largest = exceeded(0, &shared.largest);
    const int64_t saturating = may_saturate(args.shape.wire, args.shape.k);
    scale = wire_scale_as<Format>({largest, exceeded(saturating, &shared.fitting)});
  }

  if (threadIdx.x == 0) {
    const Control& control = *workspace.control;
    shared.plan = {control.threshold,
                   control.ties,
                   scale,
                   control.outcome == kFewValues,
                   control.from_memory != 0,
                   control.outcome != kUseless,
                   scale == control.scale};
  }
  unsigned long long sum = 0, met;
  for (uint32_t group = threadIdx.x; group < blockIdx.x; group += kThreads)
    sum += workspace.groups[group];
  block_exclusive_sum<kThreads>(sum, &met, shared.warp_sums);
  const EmitPlan& plan = shared.plan;  // after the barrier
  const uint32_t ties = plan.ties;

  const uint32_t end = args.groups.first_tile(blockIdx.x + 1);
  for (uint32_t first = args.groups.first_tile(blockIdx.x); first < end; first += kScanTiles) {
    const uint32_t own = first + threadIdx.x;
    const bool placing = threadIdx.x < kScanTiles && own < end;
    const uint32_t selected = placing ? workspace.selected[own] : 0;
    unsigned long long total;
    const unsigned long long before =
        met + block_exclusive_sum<kThreads>(
                  static_cast<unsigned long long>(selected >> 16) << 32 | (selected & 0xffffu),
                  &total, shared.next_warp_sums);
    if (placing) {
      shared.met[threadIdx.x] = before;
      shared.place[threadIdx.x] = workspace.tiles[own];
      constexpr uint32_t kWorkTiles = kTile / kWorkTile;
      if (own % kWorkTiles == 0) out.starts[own / kWorkTiles] = taken(before, ties);
    }
    __syncthreads();
    for (uint32_t t = warp_id(); t < kScanTiles && first + t < end; t += kWarps)
      if (!plan.from_memory || workspace.selected[first + t] != 0)
        emit_tile<Format>(args, plan, first + t, shared.place[t], shared.met[t]);
    met += total;  // the next round writes shared.met after the barrier in its sum
  }

  // The histograms must be zero for the next call; nobody reads them any more.
#pragma unroll 1
  for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < kClearedWords;
       i += gridDim.x * kThreads)
    workspace.pass_bins[i] = 0;

  if (blockIdx.x != gridDim.x - 1 || threadIdx.x != 0) return;
  Control* control = workspace.control;
  // Unless there are exactly k entries, the header says that the payload is damaged.
  const bool complete = taken(met, ties) == args.shape.k;
  const bool overflowed = all.found_inf.load() != 0.0f;
  const uint32_t nonfinite = all.workspaces.first.control->nonfinite + overflowed;  // <= 2 N + 1
  *out.header = make_header(args.shape, nonfinite, scale, all.tag);
  if (!complete) out.header->magic = 0;
  control->guess.scale = scale;
  // A guess from which the k-th is too far away for the bins is too low, but learned from like any.
  const uint32_t found = control->found;
  const bool enough = args.shape.k <= found && found <= workspace.capacity;
  learn(&control->guess, control->threshold, args.shape.k, found,
        control->outcome == kUseless && !enough);
  control->found = 0;
  control->refound = 0;
}

}  // namespace

void select(const SelectArgs& args, const Stream& stream) {
  const Grid grid{args.blocks, args.ranges};
  launch_early(refine_kernel, grid, kThreads, stream, args);
  launch_early(count_kernel, grid, kThreads, stream, args);
  with_wire_type(args.shapes[0].wire, [&](auto format) {
    launch_early(emit_kernel<decltype(format)>, grid, kThreads, stream, args);
  });
}

}  // namespace gmc::cuda
