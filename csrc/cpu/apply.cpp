// apply: w -= lr * a on the entries of an aggregate.
#include <algorithm>

#include "aggregate.h"
#include "kernels.h"
#include "partition.h"

namespace gmc::cpu {

void apply(const std::vector<Segment>& params, const uint8_t* aggregate, int64_t numel, float lr) {
  const int64_t parts = part_count(numel);
  for_each_part(parts, [&](int64_t part) {
    const int64_t end = first_tile(part + 1, parts, numel);
    auto param = params.begin();
    for (int64_t tile = first_tile(part, parts, numel); tile < end; ++tile) {
      const AggregateEntries entries = aggregate_entries(aggregate, numel, tile);
      for (int64_t entry = 0; entry < entries.count; ++entry) {
        const int64_t i = tile * kTile + entries.indices[entry];
        while (i >= param->begin + param->numel) ++param;
        const int64_t at = i - param->begin;
        store_param(param->data, param->dtype, at,
                    load_value(param->data, param->dtype, at) - lr * entries.values[entry]);
      }
    }
  });
}

}  // namespace gmc::cpu
