// The step of a dense bucket: v itself is summed over all ranks, between accumulate and
// apply_dense.
#include <algorithm>

#include "loops_table.h"
#include "partition.h"
#include "rule_pass.h"
#include "segments.h"
#include "shared/rule.h"

namespace gmc::cpu {
namespace {

constexpr uint64_t kLargestCount = uint64_t{1} << 24;  // a float32 sum counts on exactly up to here

}  // namespace

void run(const AccumulateCall& call) {
  const RuleCall& rule = call.rule;
  const int64_t parts = part_count(rule.numel);
  std::vector<uint64_t> nonfinite(parts);
  for_each_part(parts, [&](int64_t part) {
    const int64_t begin = first_element(part, parts, rule.numel);
    const int64_t end = first_element(part + 1, parts, rule.numel);
    RulePass pass(rule, {nullptr, call.aggregate}, begin);
    for (int64_t i = begin; i < end; i += kChunk) {
      const int64_t n = std::min(kChunk, end - i);
      pass.chunk(i, n);
      std::copy_n(rule.memory + i, n, call.total + i);
    }
    nonfinite[part] = pass.nonfinite();
  });
  uint64_t count = rule.found_inf.load() != 0.0f;
  for (const uint64_t of_part : nonfinite) count += of_part;
  float* const counts = call.total + rule.numel;
  std::fill_n(counts, call.ranks, 0.0f);
  counts[call.rank] = static_cast<float>(std::min(count, kLargestCount));
}

void run(const ApplyDenseCall& call) {
  const std::vector<Segment>& params = call.move.params;
  const int64_t parts = part_count(call.numel);
  const float factor = mean_factor(call.ranks), lr = call.move.lr.load();
  const bool skipped = call.move.skip.skipped();
  call.move.skip.leave_behind(0);
  for_each_part(parts, [&](int64_t part) {
    const int64_t begin = first_element(part, parts, call.numel);
    const int64_t end = first_element(part + 1, parts, call.numel);
    if (skipped) return static_cast<void>(std::fill_n(call.total + begin, end - begin, 0.0f));
    size_t first = find_segment(params, begin);
    for_each_piece(params, &first, begin, end,
                   [&](const Segment& param, int64_t i, int64_t at, int64_t length) {
                     loops().apply_dense(call.total + begin + at, call.memory + begin + at,
                                         element(param, i), param.dtype, factor, lr, length);
                   });
  });
}

}  // namespace gmc::cpu
