#include "guess.h"

#include <algorithm>
#include <cmath>

#include "../numbers.h"

namespace gmc::cpu {
namespace {

// How far, as a share, the guess should be below the k-th magnitude: so that 1.2 k candidates would
// have been found, if their number grows exponentially with the distance.
float distance_for_some_more(const Guess& guess, float kth, int64_t candidates, int64_t k) {
  const float distance = 1.0f - bits_float(guess.key) / kth;
  const float surplus = static_cast<float>(candidates) / static_cast<float>(k);
  return distance * std::log(1.2f) / std::log(std::max(surplus, 1.02f));
}

}  // namespace

void update_guess(Guess* guess, const Outcome& outcome, uint32_t threshold, int64_t k) {
  const bool repaired = outcome.used && !outcome.enough(k);
  // A repair costs far more than some candidates too many.
  guess->caution = std::max(1.0f, 0.97f * guess->caution);
  if (repaired) {
    ++guess->repairs;
    if (!outcome.overflow) guess->caution = std::min(2.0f * guess->caution, 16.0f);
  }
  const float kth = bits_float(threshold);
  float distance = 0.05f;
  if (outcome.used && !repaired && kth > 0.0f)
    distance = distance_for_some_more(*guess, kth, outcome.candidates, k);
  distance = std::clamp(distance * guess->caution, 0.001f, 0.9f);
  // While memory fills up, the k-th magnitude grows by nearly the same amount in each step, so
  // its growth as a share shrinks, and the smoothed one lags behind.
  const bool known = guess->kth > 0.0f && kth > 0.0f;
  const float growth = known ? std::clamp(1.0f - guess->kth / kth, -0.2f, 0.5f) : 0.0f;
  guess->growth = 0.5f * (guess->growth + growth);
  guess->kth = kth;
  const float next = guess->growth / (1.0f + 2.0f * std::max(guess->growth, 0.0f));
  guess->key = float_bits(kth * (1.0f + next) * (1.0f - distance));
  guess->known = guess->key != 0;
}

}  // namespace gmc::cpu
