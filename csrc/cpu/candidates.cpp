#include "candidates.h"

#include <algorithm>

#include "shared/rule.h"

namespace gmc::cpu {

void Candidates::reserve(int64_t more) {
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

void Collector::collect(int64_t begin, int64_t end, uint32_t threshold, Candidates* out,
                        const NextGradients& next) const {
  if (out->overflow) return;
  out->reserve(end - begin);
  uint32_t* index = out->index.get() + out->count;
  uint32_t* bits = out->bits.get() + out->count;
  const int64_t count = loops().collect(memory_ + begin, end - begin, static_cast<uint32_t>(begin),
                                        threshold, index, bits, next.data, next.element_size);
  take_out(index, bits, count, scale_);
  out->count += count;
  out->overflow = out->count > 4 * k_ + kTile;
}

void Collector::collect_all(int64_t begin, int64_t end, uint32_t threshold, Candidates* out) const {
  for (int64_t i = begin; i < end; i += kChunk)
    collect(i, std::min(i + kChunk, end), threshold, out);
}

int64_t Collector::add_zeros(int64_t begin, int64_t end, int64_t wanted, Candidates* out) const {
  Candidates all;
  all.reserve(out->count + std::min(wanted, end - begin));
  int64_t next = 0, added = 0;
  const auto append = [&](uint32_t index, uint32_t bits) {
    all.index[all.count] = index;
    all.bits[all.count++] = bits;
  };
  for (int64_t i = begin; i < end && added < wanted; ++i) {
    if (next < out->count && out->index[next] == i) {
      append(out->index[next], out->bits[next]);
      ++next;
    } else {
      const uint32_t zero = float_bits(memory_[i]);
      append(static_cast<uint32_t>(i), zero);
      take_out(&all.index[all.count - 1], &zero, 1, scale_);
      ++added;
    }
  }
  for (; next < out->count; ++next) append(out->index[next], out->bits[next]);
  *out = std::move(all);
  return added;
}

// Leaves in memory what the wire type loses of each value.
void Collector::take_out(const uint32_t* index, const uint32_t* bits, int64_t count,
                         int scale) const {
  with_wire_type(wire_, [=, this](auto format) {
    using Format = decltype(format);
    for (int64_t i = 0; i < count; ++i) {
      memory_[index[i]] = left_behind<Format>(bits_float(bits[i]), scale);
    }
  });
}

void Collector::take_out_again(const Candidates& taken, int scale) const {
  if (scale != scale_) take_out(taken.index.get(), taken.bits.get(), taken.count, scale);
}

void Collector::put_back(const Candidates& taken) const {
  for (int64_t i = 0; i < taken.count; ++i) memory_[taken.index[i]] = bits_float(taken.bits[i]);
}

}  // namespace gmc::cpu
