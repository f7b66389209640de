// compress: one pass over memory and gradient that also collects candidates for the selection,
// then exact selection among them. Traffic per element: memory read and written, gradient read
// (12 bytes for float32), parameters when there is weight decay, the momentum buffer for DGC.
#include <algorithm>
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
  float slack;     // guess = k-th magnitude * (1 - slack)
  uint32_t reserved;
  uint64_t repairs;
};
static_assert(sizeof(State) <= kStateBytes, "the state has a fixed size");

struct Candidates {
  std::unique_ptr<uint32_t[]> index, key;
  int64_t count = 0, capacity = 0;
  uint64_t nonfinite = 0;
  bool overflow = false;

  void reserve(int64_t more) {
    if (count + more <= capacity) return;
    const int64_t larger = std::max(count + more, 2 * capacity);
    std::unique_ptr<uint32_t[]> wider_index(new uint32_t[larger]), wider_key(new uint32_t[larger]);
    std::copy_n(index.get(), count, wider_index.get());
    std::copy_n(key.get(), count, wider_key.get());
    index = std::move(wider_index);
    key = std::move(wider_key);
    capacity = larger;
  }
};

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
    float* memory = args_.memory + begin;
    load_gradient(begin, n, out);
    if (args_.momentum_buffer) {
      add_decay(begin, n);
      loops_.local_momentum(value_, buffer_, memory, args_.momentum_buffer + begin, args_.momentum,
                            args_.nesterov, n);
    } else {
      loops_.add_memory(value_, memory, n);
      add_decay(begin, n);
      if (args_.aggregate) add_global_momentum(begin, n);
    }
    if (!loops_.settle(value_, n)) keep_finite(begin, n, out);
    if (args_.momentum_buffer)
      std::memcpy(args_.momentum_buffer + begin, buffer_, n * sizeof(float));
    std::memcpy(memory, value_, n * sizeof(float));
    if (collecting_ && !out->overflow) {
      out->reserve(n);
      out->count += loops_.collect(value_, n, static_cast<uint32_t>(begin), threshold_,
                                   out->index.get() + out->count, out->key.get() + out->count);
      out->overflow = out->count > 4 * args_.k + kTile;
    }
  }

  void load_gradient(int64_t begin, int64_t n, Candidates* out) {
    for_each_piece(args_.grads, &grad_segment_, begin, begin + n,
                   [&](const Segment& grad, int64_t i, int64_t at, int64_t length) {
                     if (!grad.data || args_.found_inf) {
                       std::fill_n(value_ + at, length, 0.0f);
                     } else {
                       out->nonfinite += loops_.load_gradient(
                           value_ + at, element(grad, i), grad.dtype, args_.grad_factor, length);
                     }
                   });
  }

  void add_decay(int64_t begin, int64_t n) {
    for_each_piece(args_.params, &param_segment_, begin, begin + n,
                   [&](const Segment& param, int64_t i, int64_t at, int64_t length) {
                     loops_.add_decay(value_ + at, element(param, i), param.dtype,
                                      args_.weight_decay, length);
                   });
  }

  void add_global_momentum(int64_t begin, int64_t n) {
    if (begin % kTile == 0) {
      entries_ = aggregate_entries(args_.aggregate, args_.numel, begin / kTile);
      next_entry_ = 0;
    }
    const int64_t tile = begin / kTile * kTile;
    for (; next_entry_ < entries_.count; ++next_entry_) {
      const int64_t i = tile + entries_.indices[next_entry_] - begin;
      if (static_cast<uint64_t>(i) >= static_cast<uint64_t>(n)) break;
      value_[i] = value_[i] + args_.momentum * entries_.values[next_entry_];
    }
  }

  // An overflow of float32 (or a non-finite parameter) leaves the element as it was.
  void keep_finite(int64_t begin, int64_t n, Candidates* out) {
    const auto finite_or_zero = [](float x) { return is_finite(x) ? x : 0.0f; };
    for (int64_t i = 0; i < n; ++i) {
      if (is_finite(value_[i])) continue;
      value_[i] = finite_or_zero(args_.memory[begin + i]);
      if (args_.momentum_buffer) buffer_[i] = finite_or_zero(args_.momentum_buffer[begin + i]);
      ++out->nonfinite;
    }
  }

  const CompressArgs& args_;
  const Loops& loops_;
  const uint32_t threshold_;
  const bool collecting_;
  size_t grad_segment_ = 0, param_segment_ = 0;
  AggregateEntries entries_{};
  int64_t next_entry_ = 0;
  alignas(64) float value_[kChunk];
  alignas(64) float buffer_[kChunk];
};

// Writes the selected entries of one part after another; the residual stays in memory.
class Emitter {
 public:
  Emitter(const CompressArgs& args, const Selection& selection, int64_t part, int64_t first_tile)
      : memory_(args.memory),
        wire_(args.wire),
        threshold_(selection.threshold),
        ties_(selection.ties[part]),
        position_(selection.position[part]),
        next_tile_(first_tile) {
    const PayloadLayout layout(args.numel, args.k, args.wire);
    starts_ = reinterpret_cast<uint32_t*>(args.payload + layout.starts);
    indices_ = reinterpret_cast<uint16_t*>(args.payload + layout.indices);
    values_ = args.payload + layout.values;
  }

  void emit(const uint32_t* index, const uint32_t* key, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      if (key[i] < threshold_) continue;
      if (key[i] == threshold_ && ties_-- <= 0) continue;
      start_tiles(index[i] / kTile + 1);
      float& value = memory_[index[i]];
      indices_[position_] = static_cast<uint16_t>(index[i] % kTile);
      value -= store_wire(values_, wire_, position_, value);
      ++position_;
    }
  }

  void start_tiles(int64_t end) {
    for (; next_tile_ < end; ++next_tile_) starts_[next_tile_] = static_cast<uint32_t>(position_);
  }

 private:
  float* memory_;
  const DType wire_;
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

// Aims at 1.25 k to 2 k candidates for the next step.
void update_guess(State* state, uint32_t threshold, bool repaired, bool overflow, int64_t count,
                  int64_t k) {
  if (state->slack == 0.0f) state->slack = 0.08f;
  if (repaired) {
    state->slack *= overflow ? 0.5f : 1.5f;
    ++state->repairs;
  } else if (state->has_guess && count > 2 * k) {
    state->slack *= 0.8f;
  } else if (state->has_guess && count < k + k / 4) {
    state->slack *= 1.25f;
  }
  state->slack = std::clamp(state->slack, 0.001f, 0.9f);
  state->guess = float_bits(bits_float(threshold) * (1.0f - state->slack));
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

  int64_t count = 0;
  uint64_t nonfinite = args.found_inf;
  bool overflow = false;
  for (const Candidates& candidates : found) {
    count += candidates.count;
    nonfinite += candidates.nonfinite;
    overflow |= candidates.overflow;
  }
  const bool from_candidates = state->has_guess && !overflow && count >= args.k;

  std::vector<KeySpan> spans(parts);
  for (int64_t part = 0; part < parts; ++part) {
    if (from_candidates) {
      spans[part] = {found[part].key.get(), found[part].count};
    } else {
      spans[part] = {reinterpret_cast<const uint32_t*>(args.memory + begin(part)),
                     begin(part + 1) - begin(part)};
    }
  }
  const Selection selection = select(spans, args.k);

  for_each_part(parts, [&](int64_t part) {
    Emitter emitter(args, selection, part, first(part));
    if (from_candidates) {
      emitter.emit(found[part].index.get(), found[part].key.get(), found[part].count);
    } else {
      Candidates chunk;
      chunk.reserve(kChunk);
      for (int64_t i = begin(part); i < begin(part + 1); i += kChunk) {
        const int64_t n = std::min(kChunk, begin(part + 1) - i);
        const int64_t reached =
            loops().collect(args.memory + i, n, static_cast<uint32_t>(i), selection.threshold,
                            chunk.index.get(), chunk.key.get());
        emitter.emit(chunk.index.get(), chunk.key.get(), reached);
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
  update_guess(state, selection.threshold, state->has_guess && !from_candidates, overflow, count,
               args.k);
}

int64_t state_repairs(const uint8_t* state) {
  return static_cast<int64_t>(reinterpret_cast<const State*>(state)->repairs);
}

}  // namespace gmc::cpu
