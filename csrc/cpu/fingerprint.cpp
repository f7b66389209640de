// fingerprint: 64 bits for each tensor of a list, which tell replicas that differ.
#include "../fingerprint.h"

#include "kernels.h"
#include "partition.h"
#include "segments.h"

namespace gmc::cpu {

void fingerprint(const std::vector<Segment>& params, int64_t numel, uint64_t* prints) {
  std::fill_n(prints, params.size(), uint64_t{0});
  const int64_t parts = part_count(numel);
  for_each_part(parts, [&](int64_t part) {
    const int64_t begin = first_element(part, parts, numel);
    size_t first = find_segment(params, begin);
    for_each_piece(params, &first, begin, first_element(part + 1, parts, numel),
                   [&](const Segment& param, int64_t i, int64_t, int64_t length) {
                     uint64_t sum = 0;
                     for (int64_t end = i + length; i < end; ++i)
                       sum += fingerprint_term(param.data, param.dtype, i);
                     __atomic_fetch_add(&prints[&param - params.data()], sum, __ATOMIC_RELAXED);
                   });
  });
}

}  // namespace gmc::cpu
