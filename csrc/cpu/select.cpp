// A radix search for the k-th largest key: three histograms, of 11, 11 and 9 bits, each over the
// keys that share the digits found so far.
#include "select.h"

#include <algorithm>
#include <cstring>

#include "partition.h"

namespace gmc::cpu {
namespace {

struct Digit {
  int shift, bits;
};
constexpr Digit kDigits[] = {{20, 11}, {9, 11}, {0, 9}};
constexpr int kBins = 2048;

void count_digits(const KeySpan& span, Digit digit, uint32_t prefix, uint32_t* bins) {
  const int prefix_shift = digit.shift + digit.bits;
  const uint32_t digit_mask = (1u << digit.bits) - 1;
  for (int64_t i = 0; i < span.size; ++i) {
    uint32_t key;
    std::memcpy(&key, static_cast<const char*>(span.words) + 4 * i, sizeof key);
    key &= kKeyMask;
    if (key >> prefix_shift == prefix) ++bins[(key >> digit.shift) & digit_mask];
  }
}

// Counts for each part how many keys lie in each bin of a digit.
class Histogram {
 public:
  explicit Histogram(int64_t parts) : parts_(parts), bins_(parts * kBins) {}

  void count(const std::vector<KeySpan>& spans, Digit digit, uint32_t prefix) {
    std::fill(bins_.begin(), bins_.end(), 0u);
    for_each_part(parts_, [&](int64_t part) {
      count_digits(spans[part], digit, prefix, &bins_[part * kBins]);
    });
  }

  uint32_t at(int64_t part, int64_t bin) const { return bins_[part * kBins + bin]; }

  int64_t total(int64_t bin) const {
    int64_t sum = 0;
    for (int64_t part = 0; part < parts_; ++part) sum += at(part, bin);
    return sum;
  }

  // Returns the bin that holds the wanted-th largest key, after pass(bin) for each bin above it.
  template <class Function>
  int64_t find(Digit digit, int64_t* wanted, const Function& pass) const {
    for (int64_t bin = (int64_t{1} << digit.bits) - 1; bin > 0; --bin) {
      const int64_t here = total(bin);
      if (here >= *wanted) return bin;
      *wanted -= here;
      pass(bin);
    }
    return 0;
  }

 private:
  const int64_t parts_;
  std::vector<uint32_t> bins_;
};

// The exponents of the selected entries, which lie in the bins of the first digit from `lowest` up.
// The first digit tells exponents apart.
Exponents exponents_from(const Histogram& histogram, int64_t lowest, int64_t may_saturate) {
  const auto highest_above = [&](int64_t allowed) {
    int64_t bin = kBins - 1;
    for (int64_t above = 0; bin > lowest; --bin) {
      above += histogram.total(bin);
      if (above > allowed) break;
    }
    return exponent_field(static_cast<uint32_t>(bin) << kDigits[0].shift);
  };
  return {highest_above(0), highest_above(may_saturate)};
}

}  // namespace

uint32_t lower_bound(const std::vector<KeySpan>& spans, int64_t k) {
  Histogram histogram(static_cast<int64_t>(spans.size()));
  histogram.count(spans, kDigits[0], 0);
  const int64_t bin = histogram.find(kDigits[0], &k, [](int64_t) {});
  return static_cast<uint32_t>(bin) << kDigits[0].shift;
}

Selection select(const std::vector<KeySpan>& spans, int64_t k, int64_t may_saturate) {
  const int64_t parts = static_cast<int64_t>(spans.size());
  Histogram histogram(parts);
  std::vector<int64_t> above(parts, 0);
  Selection selection{0, {}, std::vector<int64_t>(parts), std::vector<int64_t>(parts)};
  int64_t wanted = k;  // entries still to be found below the bins passed so far

  for (const Digit digit : kDigits) {
    histogram.count(spans, digit, selection.threshold);
    const int64_t found = histogram.find(digit, &wanted, [&](int64_t bin) {
      for (int64_t part = 0; part < parts; ++part) above[part] += histogram.at(part, bin);
    });
    if (digit.shift == kDigits[0].shift)
      selection.exponents = exponents_from(histogram, found, may_saturate);
    selection.threshold = selection.threshold << digit.bits | static_cast<uint32_t>(found);
    for (int64_t part = 0; part < parts; ++part) selection.ties[part] = histogram.at(part, found);
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
