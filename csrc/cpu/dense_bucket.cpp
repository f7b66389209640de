// The step of a dense bucket: v itself is summed over all ranks, between accumulate and
// apply_dense.
#include <algorithm>

#include "../rule.h"
#include "kernels.h"
#include "loops_table.h"
#include "partition.h"
#include "rule_pass.h"
#include "segments.h"

namespace gmc::cpu {
namespace {

constexpr uint64_t kLargestCount = uint64_t{1} << 24;  // a float32 sum counts on exactly up to here

}  // namespace

void accumulate(const AccumulateArgs& args) {
  const RuleArgs& rule = args.rule;
  const int64_t parts = part_count(rule.numel);
  std::vector<uint64_t> nonfinite(parts);
  for_each_part(parts, [&](int64_t part) {
    const int64_t begin = first_element(part, parts, rule.numel);
    const int64_t end = first_element(part + 1, parts, rule.numel);
    RulePass pass(rule, {nullptr, args.aggregate}, begin);
    for (int64_t i = begin; i < end; i += kChunk) {
      const int64_t n = std::min(kChunk, end - i);
      pass.chunk(i, n);
      std::copy_n(rule.memory + i, n, args.total + i);
    }
    nonfinite[part] = pass.nonfinite();
  });
  uint64_t count = rule.found_inf;
  for (const uint64_t of_part : nonfinite) count += of_part;
  float* const counts = args.total + rule.numel;
  std::fill_n(counts, args.ranks, 0.0f);
  counts[args.rank] = static_cast<float>(std::min(count, kLargestCount));
}

void apply_dense(const ApplyDenseArgs& args) {
  const int64_t parts = part_count(args.numel);
  const float factor = mean_factor(args.ranks);
  for_each_part(parts, [&](int64_t part) {
    const int64_t begin = first_element(part, parts, args.numel);
    const int64_t end = first_element(part + 1, parts, args.numel);
    if (args.skip) return static_cast<void>(std::fill_n(args.total + begin, end - begin, 0.0f));
    size_t first = find_segment(args.params, begin);
    for_each_piece(args.params, &first, begin, end,
                   [&](const Segment& param, int64_t i, int64_t at, int64_t length) {
                     loops().apply_dense(args.total + begin + at, args.memory + begin + at,
                                         element(param, i), param.dtype, factor, args.lr, length);
                   });
  });
}

}  // namespace gmc::cpu
