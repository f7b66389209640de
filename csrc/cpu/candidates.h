// Candidates for the selection: entries of memory that reach a threshold, in index order. While
// they are candidates, memory holds what it will hold once they are sent: their lines are in the
// cache when they are found, and most of them will be sent. The others are put back.
#pragma once

#include <memory>

#include "rule_pass.h"

namespace gmc::cpu {

struct Candidates {
  std::unique_ptr<uint32_t[]> index, bits;
  int64_t count = 0, capacity = 0;
  bool overflow = false;  // there are far more than k; the rest was left in memory

  void clear() {
    count = 0;
    overflow = false;
  }

  // Makes room for `more` candidates, and for what collect may write after them.
  void reserve(int64_t more);
};

// Takes candidates out of memory and puts them back. scale: the scale expected for the payload.
class Collector {
 public:
  Collector(float* memory, int64_t k, WireType wire, int scale)
      : memory_(memory), k_(k), wire_(wire), scale_(scale) {}

  // Appends the elements of [begin, end) whose key reaches the threshold, until there are far more
  // than k.
  void collect(int64_t begin, int64_t end, uint32_t threshold, Candidates* out,
               const NextGradients& next = {}) const;
  // Calls collect for [begin, end) in chunks.
  void collect_all(int64_t begin, int64_t end, uint32_t threshold, Candidates* out) const;

  // Where candidates are all that is not zero, adds the first zeros of [begin, end), `wanted` at
  // most, and returns how many.
  int64_t add_zeros(int64_t begin, int64_t end, int64_t wanted, Candidates* out) const;

  void put_back(const Candidates& taken) const;
  // Takes candidates out again that were taken out already, if the scale is not the expected one.
  void take_out_again(const Candidates& taken, int scale) const;

 private:
  float* const memory_;
  const int64_t k_;
  const WireType wire_;
  const int scale_;

  void take_out(const uint32_t* index, const uint32_t* bits, int64_t count, int scale) const;
};

}  // namespace gmc::cpu
