// A radix search for the k-th largest key: three histograms, of 11, 11 and 9 bits, each over the
// keys that share the digits found so far.
#include "select.h"

#include <algorithm>

#include "partition.h"

namespace gmc::cpu {
namespace {

struct Digit {
  int shift, bits;
};
constexpr Digit kDigits[] = {{20, 11}, {9, 11}, {0, 9}};
constexpr int kBins = 2048;
constexpr uint32_t kKeyMask = 0x7fffffffu;

void count_digits(const KeySpan& span, Digit digit, uint32_t prefix, uint32_t* bins) {
  const int prefix_shift = digit.shift + digit.bits;
  const uint32_t digit_mask = (1u << digit.bits) - 1;
  for (int64_t i = 0; i < span.size; ++i) {
    const uint32_t key = span.words[i] & kKeyMask;
    if (key >> prefix_shift == prefix) ++bins[(key >> digit.shift) & digit_mask];
  }
}

}  // namespace

Selection select(const std::vector<KeySpan>& spans, int64_t k) {
  const int64_t parts = static_cast<int64_t>(spans.size());
  std::vector<uint32_t> bins(parts * kBins);
  std::vector<int64_t> above(parts, 0);
  Selection selection{0, std::vector<int64_t>(parts), std::vector<int64_t>(parts)};
  int64_t wanted = k;  // entries still to be found below the bins passed so far

  for (const Digit digit : kDigits) {
    std::fill(bins.begin(), bins.end(), 0u);
    for_each_part(parts, [&](int64_t part) {
      count_digits(spans[part], digit, selection.threshold, &bins[part * kBins]);
    });
    int64_t bin = (int64_t{1} << digit.bits) - 1;
    for (;; --bin) {
      int64_t total = 0;
      for (int64_t part = 0; part < parts; ++part) total += bins[part * kBins + bin];
      if (total >= wanted || bin == 0) break;
      wanted -= total;
      for (int64_t part = 0; part < parts; ++part) above[part] += bins[part * kBins + bin];
    }
    selection.threshold = selection.threshold << digit.bits | static_cast<uint32_t>(bin);
    for (int64_t part = 0; part < parts; ++part) selection.ties[part] = bins[part * kBins + bin];
  }

  int64_t position = 0;
  for (int64_t part = 0; part < parts; ++part) {
    selection.ties[part] = std::min(selection.ties[part], wanted);
    wanted -= selection.ties[part];
    selection.position[part] = position;
    position += above[part] + selection.ties[part];
  }
  return selection;
}

}  // namespace gmc::cpu
