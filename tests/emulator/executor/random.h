// splitmix64 (Steele, Lea and Flood, 2014): the same seed gives the same schedule everywhere.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace emulator {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  unsigned below(unsigned n) { return unsigned((next() >> 32) * n >> 32); }
  // 0..n-1 in random order, or as they are when not shuffled.
  std::vector<int> order(int n, bool shuffled) {
    std::vector<int> result(static_cast<size_t>(n));
    for (int i = 0; i < n; ++i) {
      const int j = shuffled ? int(below(unsigned(i + 1))) : i;
      result[size_t(i)] = result[size_t(j)];
      result[size_t(j)] = i;
    }
    return result;
  }

 private:
  uint64_t state_;
};

}  // namespace emulator
