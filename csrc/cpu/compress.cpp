// compress: one pass over memory and gradient that also collects candidates for the selection,
// then exact selection among them. Traffic per element: memory read and written, gradient read
// (12 bytes for float32), parameters when there is weight decay, the momentum buffer for DGC.
#include <algorithm>
#include <numeric>

#include "candidates.h"
#include "emit.h"
#include "partition.h"
#include "rule_pass.h"
#include "sample.h"
#include "segments.h"
#include "select.h"

namespace gmc::cpu {
namespace {

constexpr int64_t kStateBytes = 64;
static_assert(sizeof(Guess) <= kStateBytes, "the state has a fixed size");

bool overflowed(const std::vector<Candidates>& parts) {
  return std::any_of(parts.begin(), parts.end(), [](const Candidates& c) { return c.overflow; });
}

int64_t total(const std::vector<Candidates>& parts) {
  int64_t sum = 0;
  for (const Candidates& part : parts) sum += part.count;
  return sum;
}

// The part of each segment that lies in a range.
std::vector<Segment> within(const std::vector<Segment>& segments, int64_t begin, int64_t numel) {
  std::vector<Segment> result;
  size_t first = find_segment(segments, begin);
  for_each_piece(segments, &first, begin, begin + numel,
                 [&](const Segment& segment, int64_t from, int64_t to, int64_t length) {
                   void* const data = segment.data ? element(segment, from) : nullptr;
                   result.push_back({data, to, length, segment.dtype});
                 });
  return result;
}

RuleCall within(const RuleCall& call, int64_t begin, int64_t numel) {
  RuleCall result = call;
  result.memory += begin;
  if (result.momentum_buffer) result.momentum_buffer += begin;
  result.grads = within(call.grads, begin, numel);
  result.params = within(call.params, begin, numel);
  result.numel = numel;
  return result;
}

// Compresses one range. Returns how many of its values counted as zero.
uint64_t compress(const RuleCall& rule, const Aggregate& aggregate, const PayloadShape& shape,
                  uint32_t tag, Guess* guess, uint8_t* payload) {
  const int64_t k = shape.k;
  const Sample sample(rule.numel, k);
  *guess = choose_guess(*guess, k, sample, SampledValues(rule, sample));
  const Collector collector(rule.memory, k, shape.wire, guess->scale);
  const int64_t parts = part_count(rule.numel);
  const auto begin = [&](int64_t part) { return first_element(part, parts, rule.numel); };

  std::vector<Candidates> found(parts);
  std::vector<uint64_t> nonfinite(parts);
  for_each_part(parts, [&](int64_t part) {
    RulePass pass(rule, {aggregate.data, nullptr}, begin(part));
    const int64_t end = begin(part + 1);
    for (int64_t i = begin(part); i < end; i += kChunk) {
      const int64_t n = std::min(kChunk, end - i);
      pass.chunk(i, n);
      collector.collect(i, i + n, guess->key, &found[part], pass.next_gradients());
    }
    nonfinite[part] = pass.nonfinite();
  });
  const int64_t reached = total(found);
  int64_t missing = k - reached;
  const bool only_zeros_missing = guess->key == 1 && missing > 0;
  for (int64_t part = 0; part < parts && only_zeros_missing; ++part)
    missing -= collector.add_zeros(begin(part), begin(part + 1), missing, &found[part]);
  const bool repair = overflowed(found) || missing > 0;

  std::vector<KeySpan> memory(parts), keys(parts);
  bool from_candidates = !repair;
  if (repair) {
    for (int64_t part = 0; part < parts; ++part)
      memory[part] = {rule.memory + begin(part), begin(part + 1) - begin(part)};
    for_each_part(parts, [&](int64_t part) { collector.put_back(found[part]); });
    const uint32_t bound = lower_bound(memory, k);
    for_each_part(parts, [&](int64_t part) {
      found[part].clear();
      collector.collect_all(begin(part), begin(part + 1), bound, &found[part]);
    });
    from_candidates = !overflowed(found);
    if (!from_candidates)  // too many magnitudes are alike
      for_each_part(parts, [&](int64_t part) { collector.put_back(found[part]); });
  }
  for (int64_t part = 0; part < parts; ++part)
    keys[part] = {found[part].bits.get(), found[part].count};
  const Selection selection =
      select(from_candidates ? keys : memory, k, may_saturate(shape.wire, k));
  const int scale = wire_scale(shape.wire, selection.exponents);

  write_frame(shape, scale, tag, payload);
  for_each_part(parts, [&](int64_t part) {
    const int64_t tile = first_tile(part, parts, rule.numel);
    Emitter emitter(shape, scale, payload, collector, selection, part, tile);
    if (from_candidates) {
      emitter.emit(&found[part]);
    } else {
      for (int64_t i = begin(part); i < begin(part + 1); i += kChunk) {
        found[part].clear();
        collector.collect_all(i, std::min(i + kChunk, begin(part + 1)), selection.threshold,
                              &found[part]);
        emitter.emit(&found[part]);
      }
    }
    emitter.start_tiles(first_tile(part + 1, parts, rule.numel));
  });

  guess->scale = scale;
  learn(guess, selection.threshold, k, reached, repair);
  return std::accumulate(nonfinite.begin(), nonfinite.end(), uint64_t{0});
}

}  // namespace

int64_t state_nbytes(int64_t, int64_t) { return kStateBytes; }

void run(const CompressCall& call) {
  const Ranges& ranges = call.ranges;
  const int64_t stride = PayloadLayout(ranges.full).nbytes;
  uint64_t nonfinite = call.rule.found_inf.load() != 0.0f;
  for (int64_t range = 0; range < ranges.count; ++range) {
    const PayloadShape& shape = ranges.shape(range);
    Guess fresh{};
    Guess* const guess =
        call.states ? at<Guess>(call.states + range * call.state_nbytes, 0) : &fresh;
    uint8_t* const payload = call.payloads + range * stride;
    const auto compressed = [&](const RuleCall& rule) {
      return compress(rule, call.aggregate, shape, call.tag, guess, payload);
    };
    nonfinite += ranges.count == 1
                     ? compressed(call.rule)
                     : compressed(within(call.rule, range * ranges.width(), shape.numel));
  }
  const auto count = static_cast<uint32_t>(std::min<uint64_t>(nonfinite, UINT32_MAX));
  for (int64_t range = 0; range < ranges.count; ++range)
    at<PayloadHeader>(call.payloads + range * stride, 0)->nonfinite = count;
}

}  // namespace gmc::cpu
