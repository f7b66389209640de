// compress: one pass over memory and gradient that also collects candidates for the selection,
// then exact selection among them. Traffic per element: memory read and written, gradient read
// (12 bytes for float32), parameters when there is weight decay, the momentum buffer for DGC.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "aggregate.h"
#include "kernels.h"
#include "loops_table.h"
#include "partition.h"
#include "select.h"

namespace gmc::cpu {
namespace {

constexpr int64_t kChunk = 2048;  // elements worked on at a time: a few buffers of them fit in L1

// Carried from step to step. All zero means: nothing is known yet. The guess steers only which
// path is taken, never the result.
struct State {
  uint32_t has_guess;
  uint32_t guess;  // a key, expected to lie a little under the k-th largest
  float kth;       // the k-th magnitude of the last step
  float growth;    // of the k-th magnitude from step to step, as a share, smoothed
  float caution;   // above 1 after repairs: widens the distance between guess and k-th magnitude
  uint64_t repairs;
};
static_assert(sizeof(State) <= kStateBytes, "the state has a fixed size");

struct Candidates {
  std::unique_ptr<uint32_t[]> index, bits;
  int64_t count = 0, capacity = 0;
  uint64_t nonfinite = 0;
  bool overflow = false;

  void clear() {
    count = 0;
    overflow = false;
  }

  // Makes room for `more` candidates, and for what collect may write behind them.
  void reserve(int64_t more) {
    more += 16;
    if (count + more <= capacity) return;
    const int64_t larger = std::max(count + more, 2 * capacity);
    for (auto* list : {&index, &bits}) {
      std::unique_ptr<uint32_t[]> wider(new uint32_t[larger]);
      std::copy_n(list->get(), count, wider.get());
      *list = std::move(wider);
    }
    capacity = larger;
  }
};

// How many candidates all parts hold together.
struct Count {
  int64_t total = 0;
  bool overflow = false;

  bool enough(int64_t k) const { return !overflow && total >= k; }
};

Count count(const std::vector<Candidates>& parts) {
  Count sum;
  for (const Candidates& part : parts) {
    sum.total += part.count;
    sum.overflow |= part.overflow;
  }
  return sum;
}

// What the wire dtype loses of a value.
template <DType wire>
float wire_residual(float value) {
  uint32_t sent;
  return value - store_wire(&sent, wire, 0, value);
}

template <DType wire>
void take_out_as(float* memory, const uint32_t* index, const uint32_t* bits, int64_t count) {
  for (int64_t i = 0; i < count; ++i) memory[index[i]] = wire_residual<wire>(bits_float(bits[i]));
}

// Leaves in memory what it will hold if these values are sent: their lines are in the cache now,
// and most will be. Those that are not are put back.
void take_out(const CompressArgs& args, const uint32_t* index, const uint32_t* bits,
              int64_t count) {
  switch (args.wire) {
    case DType::kBFloat16:
      return take_out_as<DType::kBFloat16>(args.memory, index, bits, count);
    case DType::kFloat16:
      return take_out_as<DType::kFloat16>(args.memory, index, bits, count);
    default:
      return take_out_as<DType::kFloat32>(args.memory, index, bits, count);
  }
}

void put_back(const CompressArgs& args, const Candidates& taken) {
  for (int64_t i = 0; i < taken.count; ++i) args.memory[taken.index[i]] = bits_float(taken.bits[i]);
}

// Takes the elements of [begin, end) whose key reaches the threshold out of memory, until there
// are far more than k. next_grads: gradients that the next chunk will read.
void collect(const CompressArgs& args, int64_t begin, int64_t end, uint32_t threshold,
             Candidates* out, const char* next_grads = nullptr, int64_t grad_size = 0) {
  if (out->overflow) return;
  out->reserve(end - begin);
  uint32_t* index = out->index.get() + out->count;
  uint32_t* bits = out->bits.get() + out->count;
  const int64_t count =
      loops().collect(args.memory + begin, end - begin, static_cast<uint32_t>(begin), threshold,
                      index, bits, next_grads, grad_size);
  take_out(args, index, bits, count);
  out->count += count;
  out->overflow = out->count > 4 * args.k + kTile;
}

void collect_all(const CompressArgs& args, int64_t begin, int64_t end, uint32_t threshold,
                 Candidates* out) {
  for (int64_t i = begin; i < end; i += kChunk)
    collect(args, i, std::min(i + kChunk, end), threshold, out);
}

// Calls function(segment, offset in the segment, offset in the chunk, length) for the pieces that
// make up [begin, end), starting the search at *first and leaving it at the last piece's segment.
template <class Function>
void for_each_piece(const std::vector<Segment>& segments, size_t* first, int64_t begin, int64_t end,
                    const Function& function) {
  for (size_t s = *first; s < segments.size() && segments[s].begin < end; ++s) {
    const Segment& segment = segments[s];
    const int64_t from = std::max(begin, segment.begin);
    const int64_t to = std::min(end, segment.begin + segment.numel);
    *first = s;
    if (from < to) function(segment, from - segment.begin, from - begin, to - from);
  }
}

const char* element(const Segment& segment, int64_t i) {
  return static_cast<const char*>(segment.data) + i * element_size(segment.dtype);
}

// The segment that holds element i, or the one after it.
size_t find_segment(const std::vector<Segment>& segments, int64_t i) {
  return std::partition_point(segments.begin(), segments.end(),
                              [i](const Segment& s) { return s.begin + s.numel <= i; }) -
         segments.begin();
}

class Pass {
 public:
  Pass(const CompressArgs& args, uint32_t threshold, bool collecting)
      : args_(args), loops_(loops()), threshold_(threshold), collecting_(collecting) {}

  void run(int64_t begin, int64_t end, Candidates* out) {
    grad_segment_ = find_segment(args_.grads, begin);
    param_segment_ = find_segment(args_.params, begin);
    for (int64_t i = begin; i < end; i += kChunk) chunk(i, std::min(kChunk, end - i), out);
  }

 private:
  void chunk(int64_t begin, int64_t n, Candidates* out) {
    float* value = args_.memory + begin;
    uint32_t largest = 0;
    const auto keep_largest = [&](uint32_t key) { largest = std::max(largest, key); };
    if (args_.momentum_buffer) {
      load_gradient(begin, n, out);
      add_decay(grad_, begin, n, -0.0f);
      keep_largest(loops_.local_momentum(value, before_, args_.momentum_buffer + begin,
                                         buffer_before_, grad_, args_.momentum, args_.nesterov, n));
    } else {
      keep_largest(accumulate(value, begin, n, out));
      keep_largest(add_decay(value, begin, n, 0.0f));
      if (args_.aggregate) keep_largest(add_global_momentum(value, begin, n));
    }
    if (largest >= kInfKey) keep_finite(value, begin, n, out);
    if (collecting_) collect(args_, begin, begin + n, threshold_, out, next_grads_, grad_size_);
  }

  uint32_t accumulate(float* value, int64_t begin, int64_t n, Candidates* out) {
    uint32_t largest = 0;
    for_each_piece(args_.grads, &grad_segment_, begin, begin + n,
                   [&](const Segment& grad, int64_t i, int64_t at, int64_t length) {
                     const bool zero = !grad.data || args_.found_inf;
                     const void* data = zero ? static_cast<const void*>(kZeros) : element(grad, i);
                     const DType dtype = zero ? DType::kFloat32 : grad.dtype;
                     uint32_t nonfinite = 0;
                     largest = std::max(largest,
                                        loops_.accumulate(value + at, before_ + at, data, dtype,
                                                          args_.grad_factor, length, &nonfinite));
                     out->nonfinite += nonfinite;
                     next_grads_ = zero ? nullptr : element(grad, i + length);
                     grad_size_ = element_size(dtype);
                   });
    return largest;
  }

  void load_gradient(int64_t begin, int64_t n, Candidates* out) {
    for_each_piece(args_.grads, &grad_segment_, begin, begin + n,
                   [&](const Segment& grad, int64_t i, int64_t at, int64_t length) {
                     if (!grad.data || args_.found_inf) {
                       std::fill_n(grad_ + at, length, 0.0f);
                     } else {
                       out->nonfinite += loops_.load_gradient(
                           grad_ + at, element(grad, i), grad.dtype, args_.grad_factor, length);
                     }
                   });
  }

  uint32_t add_decay(float* value, int64_t begin, int64_t n, float zero) {
    uint32_t largest = 0;
    for_each_piece(args_.params, &param_segment_, begin, begin + n,
                   [&](const Segment& param, int64_t i, int64_t at, int64_t length) {
                     largest = std::max(largest,
                                        loops_.add_decay(value + at, element(param, i), param.dtype,
                                                         args_.weight_decay, zero, length));
                   });
    return largest;
  }

  uint32_t add_global_momentum(float* value, int64_t begin, int64_t n) {
    if (begin % kTile == 0) {
      entries_ = aggregate_entries(args_.aggregate, args_.numel, begin / kTile);
      next_entry_ = 0;
    }
    const int64_t origin = begin % kTile;
    const uint16_t* next = entries_.indices + next_entry_;
    const uint16_t* last = entries_.indices + entries_.count;
    const int64_t count = std::lower_bound(next, last, origin + n) - next;
    const uint32_t largest = loops_.add_entries(value, origin, next, entries_.values + next_entry_,
                                                count, args_.momentum);
    next_entry_ += count;
    return largest;
  }

  // An overflow of float32 (or a non-finite parameter) leaves the element as it was.
  void keep_finite(float* value, int64_t begin, int64_t n, Candidates* out) {
    const auto finite_or_zero = [](float x) { return is_finite(x) ? x : 0.0f; };
    for (int64_t i = 0; i < n; ++i) {
      if (is_finite(value[i])) continue;
      value[i] = finite_or_zero(before_[i]);
      if (args_.momentum_buffer)
        args_.momentum_buffer[begin + i] = finite_or_zero(buffer_before_[i]);
      ++out->nonfinite;
    }
  }

  static constexpr float kZeros[kChunk] = {};

  const CompressArgs& args_;
  const Loops& loops_;
  const uint32_t threshold_;
  const bool collecting_;
  size_t grad_segment_ = 0, param_segment_ = 0;
  AggregateEntries entries_{};
  int64_t next_entry_ = 0;
  const char* next_grads_ = nullptr;
  int64_t grad_size_ = 0;
  alignas(64) float before_[kChunk];
  alignas(64) float buffer_before_[kChunk];
  alignas(64) float grad_[kChunk];
};

// Writes the selected entries of one part after another, and puts the other candidates back.
class Emitter {
 public:
  Emitter(const CompressArgs& args, const Selection& selection, int64_t part, int64_t first_tile)
      : args_(args),
        threshold_(selection.threshold),
        ties_(selection.ties[part]),
        position_(selection.position[part]),
        next_tile_(first_tile) {
    const PayloadLayout layout(args.numel, args.k, args.wire);
    starts_ = reinterpret_cast<uint32_t*>(args.payload + layout.starts);
    indices_ = reinterpret_cast<uint16_t*>(args.payload + layout.indices);
    values_ = args.payload + layout.values;
  }

  // Leaves only the selected entries among the candidates.
  void emit(Candidates* candidates) {
    put_back(args_, separate(candidates));
    switch (args_.wire) {
      case DType::kBFloat16:
        return write<DType::kBFloat16>(*candidates);
      case DType::kFloat16:
        return write<DType::kFloat16>(*candidates);
      default:
        return write<DType::kFloat32>(*candidates);
    }
  }

  // Tiles before `end` that have not begun yet begin after all entries written so far.
  void start_tiles(int64_t end) {
    for (; next_tile_ < end; ++next_tile_) starts_[next_tile_] = static_cast<uint32_t>(position_);
  }

 private:
  // Keeps the selected and returns the others. Without branches, because whether a candidate is
  // selected cannot be predicted.
  Candidates separate(Candidates* candidates) {
    uint32_t* index = candidates->index.get();
    uint32_t* bits = candidates->bits.get();
    Candidates others;
    others.reserve(candidates->count);
    int64_t selected = 0;
    for (int64_t i = 0; i < candidates->count; ++i) {
      const uint32_t this_index = index[i], this_bits = bits[i];
      const uint32_t key = this_bits & 0x7fffffffu;
      const bool tie = key == threshold_;
      const bool take = (key > threshold_) | (tie & (ties_ > 0));
      ties_ -= tie;
      others.index[others.count] = this_index;
      others.bits[others.count] = this_bits;
      others.count += !take;
      index[selected] = this_index;
      bits[selected] = this_bits;
      selected += take;
    }
    candidates->count = selected;
    return others;
  }

  template <DType wire>
  void write(const Candidates& selected) {
    for (int64_t i = 0; i < selected.count; ++i) {
      const uint32_t index = selected.index[i];
      start_tiles(index / kTile + 1);
      indices_[position_] = static_cast<uint16_t>(index % kTile);
      store_wire(values_, wire, position_, bits_float(selected.bits[i]));
      ++position_;
    }
  }

  const CompressArgs& args_;
  const uint32_t threshold_;
  int64_t ties_, position_, next_tile_;
  uint32_t* starts_;
  uint16_t* indices_;
  uint8_t* values_;
};

void zero_padding(uint8_t* payload, const PayloadLayout& layout, int64_t starts_end,
                  int64_t indices_end, int64_t values_end) {
  std::memset(payload + starts_end, 0, layout.indices - starts_end);
  std::memset(payload + indices_end, 0, layout.values - indices_end);
  std::memset(payload + values_end, 0, layout.nbytes - values_end);
}

// How far, as a share, the guess should lie below the k-th magnitude: so that 1.2 k candidates
// would have been found, if their number grows exponentially with the distance.
float distance_for_some_more(const State& state, float kth, int64_t candidates, int64_t k) {
  const float distance = 1.0f - bits_float(state.guess) / kth;
  const float surplus = static_cast<float>(candidates) / static_cast<float>(k);
  return distance * std::log(1.2f) / std::log(std::max(surplus, 1.02f));
}

void update_guess(State* state, uint32_t threshold, bool repaired, const Count& guessed,
                  int64_t k) {
  // A repair costs far more than some candidates too many.
  state->caution = std::max(1.0f, 0.97f * state->caution);
  if (repaired) {
    ++state->repairs;
    if (!guessed.overflow) state->caution = std::min(2.0f * state->caution, 16.0f);
  }
  const float kth = bits_float(threshold);
  float distance = 0.05f;
  if (state->has_guess && !repaired && kth > 0.0f)
    distance = distance_for_some_more(*state, kth, guessed.total, k);
  distance = std::clamp(distance * state->caution, 0.001f, 0.9f);
  // While memory fills up, the k-th magnitude grows by nearly the same amount in each step, so
  // its growth as a share shrinks, and the smoothed one lags behind.
  const bool known = state->kth > 0.0f && kth > 0.0f;
  const float growth = known ? std::clamp(1.0f - state->kth / kth, -0.2f, 0.5f) : 0.0f;
  state->growth = 0.5f * (state->growth + growth);
  state->kth = kth;
  const float next = state->growth / (1.0f + 2.0f * std::max(state->growth, 0.0f));
  state->guess = float_bits(kth * (1.0f + next) * (1.0f - distance));
  state->has_guess = state->guess != 0;
}

}  // namespace

void compress(const CompressArgs& args) {
  State fresh{};
  State* state = args.state ? reinterpret_cast<State*>(args.state) : &fresh;
  const int64_t parts = part_count(args.numel);
  const auto first = [&](int64_t part) { return first_tile(part, parts, args.numel); };
  const auto begin = [&](int64_t part) { return std::min(first(part) * kTile, args.numel); };

  std::vector<Candidates> found(parts);
  for_each_part(parts, [&](int64_t part) {
    Pass(args, state->guess, state->has_guess).run(begin(part), begin(part + 1), &found[part]);
  });

  uint64_t nonfinite = args.found_inf;
  for (const Candidates& candidates : found) nonfinite += candidates.nonfinite;
  const Count guessed = count(found);
  const bool repaired = state->has_guess && !guessed.enough(args.k);

  std::vector<KeySpan> memory(parts), keys(parts);
  bool from_candidates = state->has_guess && !repaired;
  if (!from_candidates) {
    for (int64_t part = 0; part < parts; ++part)
      memory[part] = {reinterpret_cast<const uint32_t*>(args.memory + begin(part)),
                      begin(part + 1) - begin(part)};
    for_each_part(parts, [&](int64_t part) { put_back(args, found[part]); });
    const uint32_t bound = lower_bound(memory, args.k);
    for_each_part(parts, [&](int64_t part) {
      found[part].clear();
      collect_all(args, begin(part), begin(part + 1), bound, &found[part]);
    });
    from_candidates = count(found).enough(args.k);
    if (!from_candidates)  // too many magnitudes are alike
      for_each_part(parts, [&](int64_t part) { put_back(args, found[part]); });
  }
  for (int64_t part = 0; part < parts; ++part)
    keys[part] = {found[part].bits.get(), found[part].count};
  const Selection selection = select(from_candidates ? keys : memory, args.k);

  for_each_part(parts, [&](int64_t part) {
    Emitter emitter(args, selection, part, first(part));
    if (from_candidates) {
      emitter.emit(&found[part]);
    } else {
      for (int64_t i = begin(part); i < begin(part + 1); i += kChunk) {
        found[part].clear();
        collect_all(args, i, std::min(i + kChunk, begin(part + 1)), selection.threshold,
                    &found[part]);
        emitter.emit(&found[part]);
      }
    }
    emitter.start_tiles(first(part + 1));
  });

  const PayloadLayout layout(args.numel, args.k, args.wire);
  zero_padding(args.payload, layout, layout.starts + 4 * tile_count(args.numel),
               layout.indices + 2 * args.k, layout.values + element_size(args.wire) * args.k);
  const PayloadHeader header{payload_tag(args.wire),
                             static_cast<uint32_t>(std::min<uint64_t>(nonfinite, UINT32_MAX)),
                             static_cast<uint32_t>(args.k), static_cast<uint32_t>(args.numel)};
  std::memcpy(args.payload, &header, sizeof header);
  update_guess(state, selection.threshold, repaired, guessed, args.k);
}

int64_t state_repairs(const uint8_t* state) {
  return static_cast<int64_t>(reinterpret_cast<const State*>(state)->repairs);
}

}  // namespace gmc::cpu
