// compress: one pass over memory and gradient that also collects candidates for the selection,
// then exact selection among them. Traffic per element: memory read and written, gradient read
// (12 bytes for float32), parameters when there is weight decay, the momentum buffer for DGC.
#include <algorithm>

#include "candidates.h"
#include "emit.h"
#include "partition.h"
#include "rule_pass.h"
#include "sample.h"
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

}  // namespace

int64_t state_nbytes(int64_t, int64_t) { return kStateBytes; }

void run(const CompressCall& call) {
  const RuleCall& rule = call.rule;
  const PayloadShape& shape = call.shape;
  const int64_t k = shape.k;
  Guess fresh{};
  Guess* guess = call.state ? at<Guess>(call.state, 0) : &fresh;
  const Sample sample(rule.numel, k);
  *guess = choose_guess(*guess, k, sample, SampledValues(rule, sample));
  const Collector collector(rule.memory, k, shape.wire, guess->scale);
  const int64_t parts = part_count(rule.numel);
  const auto begin = [&](int64_t part) { return first_element(part, parts, rule.numel); };

  std::vector<Candidates> found(parts);
  std::vector<uint64_t> nonfinite(parts);
  for_each_part(parts, [&](int64_t part) {
    RulePass pass(rule, {call.aggregate.data, nullptr}, begin(part));
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

  uint64_t count = rule.found_inf.load() != 0.0f;
  for (const uint64_t of_part : nonfinite) count += of_part;
  write_frame(shape, count, scale, call.tag, call.payload);
  for_each_part(parts, [&](int64_t part) {
    const int64_t tile = first_tile(part, parts, rule.numel);
    Emitter emitter(shape, scale, call.payload, collector, selection, part, tile);
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
}

}  // namespace gmc::cpu
