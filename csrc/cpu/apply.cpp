// apply: w -= lr * a on the entries of an aggregate.
#include <algorithm>

#include "aggregate.h"
#include "partition.h"
#include "shared/calls.h"
#include "shared/rule.h"

namespace gmc::cpu {
namespace {

constexpr int64_t kAhead = 32;  // entries whose parameters are fetched while others are worked on

// The entries [first, end) of a tile, all in one parameter; origin is the parameter's place in the
// tile.
template <class Format>
void move(void* param, const AggregateEntries& entries, int64_t first, int64_t end, int64_t origin,
          float lr) {
  auto* const words = static_cast<typename Format::Word*>(param);
  for (int64_t entry = first; entry < end; ++entry) {
    if (entry + kAhead < end)
      __builtin_prefetch(words + (entries.indices[entry + kAhead] - origin), 1);
    auto& word = words[entries.indices[entry] - origin];
    word = Format::round(moved(Format::to_float(word), lr, entries.values[entry]));
  }
}

}  // namespace

void run(const ApplyCall& call) {
  call.move.skip.leave_behind(0);
  if (call.move.skip.skipped()) {
    if (call.memory)
      run(RestoreCall{call.memory, call.payload.data, uncut(call.payload.shape), {}, false});
    return;
  }
  const std::vector<Segment>& params = call.move.params;
  const int64_t numel = call.numel;
  const float lr = call.move.lr.load();
  const int64_t parts = part_count(numel);
  for_each_part(parts, [&](int64_t part) {
    const int64_t last_tile = first_tile(part + 1, parts, numel);
    auto param = params.begin();
    for (int64_t tile = first_tile(part, parts, numel); tile < last_tile; ++tile) {
      const AggregateEntries entries = aggregate_entries(call.aggregate.data, numel, tile);
      for (int64_t first = 0, end = 0; first < entries.count; first = end) {
        const int64_t index = tile * kTile + entries.indices[first];
        while (index >= param->begin + param->numel) ++param;
        const int64_t origin = param->begin - tile * kTile;
        end = std::lower_bound(entries.indices + first, entries.indices + entries.count,
                               origin + param->numel) -
              entries.indices;
        with_dtype(param->dtype, [&](auto format) {
          move<decltype(format)>(param->data, entries, first, end, origin, lr);
        });
      }
    }
  });
}

}  // namespace gmc::cpu
