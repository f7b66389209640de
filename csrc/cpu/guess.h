// The guess: a key expected to be a little under the k-th largest, carried from step to step. It
// decides only which path a selection takes, never the result.
#pragma once

#include <cstdint>

namespace gmc::cpu {

// All zero means: nothing is known yet.
struct Guess {
  uint32_t known;
  uint32_t key;
  float kth;      // the k-th magnitude of the last step
  float growth;   // of the k-th magnitude from step to step, as a share, smoothed
  float caution;  // above 1 after repairs: widens the distance between guess and k-th magnitude
  uint64_t repairs;
  int32_t scale;  // of the last payload (scale.h)
};

// What came of a guess.
struct Outcome {
  bool used;           // there was a guess
  bool overflow;       // it let far more than k candidates through
  int64_t candidates;  // how many it let through

  bool enough(int64_t k) const { return used && !overflow && candidates >= k; }
};

// threshold: the k-th largest key.
void update_guess(Guess* guess, const Outcome& outcome, uint32_t threshold, int64_t k);

}  // namespace gmc::cpu
