// apply: w -= lr * a on the entries of an aggregate.
#include <algorithm>

#include "aggregate.h"
#include "kernels.h"
#include "partition.h"

namespace gmc::cpu {
namespace {

constexpr int64_t kAhead = 32;  // entries whose parameters are fetched while others are worked on

// The entries [first, end) of a tile, all in one parameter; origin is the parameter's place in the
// tile.
template <DType dtype>
void move(const Segment& param, const AggregateEntries& entries, int64_t first, int64_t end,
          int64_t origin, float lr) {
  char* data = static_cast<char*>(param.data);
  for (int64_t entry = first; entry < end; ++entry) {
    if (entry + kAhead < end)
      __builtin_prefetch(data + (entries.indices[entry + kAhead] - origin) * element_size(dtype),
                         1);
    const int64_t i = entries.indices[entry] - origin;
    store_param(data, dtype, i, load_value(data, dtype, i) - lr * entries.values[entry]);
  }
}

}  // namespace

void apply(const std::vector<Segment>& params, const uint8_t* aggregate, int64_t numel, float lr) {
  const int64_t parts = part_count(numel);
  for_each_part(parts, [&](int64_t part) {
    const int64_t last_tile = first_tile(part + 1, parts, numel);
    auto param = params.begin();
    for (int64_t tile = first_tile(part, parts, numel); tile < last_tile; ++tile) {
      const AggregateEntries entries = aggregate_entries(aggregate, numel, tile);
      for (int64_t first = 0, end = 0; first < entries.count; first = end) {
        const int64_t index = tile * kTile + entries.indices[first];
        while (index >= param->begin + param->numel) ++param;
        const int64_t origin = param->begin - tile * kTile;
        end = std::lower_bound(entries.indices + first, entries.indices + entries.count,
                               origin + param->numel) -
              entries.indices;
        switch (param->dtype) {
          case DType::kBFloat16:
            move<DType::kBFloat16>(*param, entries, first, end, origin, lr);
            break;
          case DType::kFloat16:
            move<DType::kFloat16>(*param, entries, first, end, origin, lr);
            break;
          default:
            move<DType::kFloat32>(*param, entries, first, end, origin, lr);
        }
      }
    }
  });
}

}  // namespace gmc::cpu
