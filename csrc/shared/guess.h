// The guess: a key expected to lie a little under the k-th largest, so that a pass can put
// candidates aside before the k-th is known. It decides only which path a selection takes, never
// its result. So all backends share this policy, though their guesses need not be the same.
//
// There are two sources. What is carried from the last call is precise while gradients are steady:
// it follows the growth of the k-th magnitude and stays below it by a distance at which 1.2 k
// candidates were found. A sample of this call's v, taken before the pass, is rough but sees
// everything new: a scale that jumps, another k, memory that is zero. As long as the sample does
// not contradict it, the carried guess is used.
#pragma once

#include <math.h>

#include "shared/rule.h"

#ifndef GMC_SMALLEST_SAMPLE
#define GMC_SMALLEST_SAMPLE 2048
#endif

namespace gmc {

// All zeros mean that nothing is known yet.
struct Guess {
  uint64_t repairs;  // how many guesses were useless
  // These are what later calls learn from.
  float kth;         // the k-th magnitude of the last call
  float growth;      // of the k-th magnitude from call to call: a smoothed share
  float distance;    // below the k-th, as a share, within which 0.2 k more were found
  float caution;     // above 1 after repairs: widens that distance
  float unseen;      // share of the candidates that the sample does not account for
  int32_t scale;     // of the last payload (scale.h)
  uint32_t k;        // of the last call
  uint32_t trusted;  // whether the carried guess was, or would have been, a good one
  // These are of this call.
  uint32_t key;     // the guess; 1 lets everything through that is not zero
  float carried;    // the carried guess, a magnitude; 0: there was none
  float in_sample;  // how many of the sample reach the guess, of k times this expected:
  float rate;       // size of the sample over numel
  float gradient;   // sum of the sample's |g'| over rate
};

// ---------------------------------------------------------------------------------------------
// The sample: runs of consecutive elements, one somewhere in each of as many equal stretches of the
// bucket; the same places in every call, so that noise does not look like change.
// ---------------------------------------------------------------------------------------------

constexpr int64_t kRun = 16;  // one line of a cache
constexpr int64_t kSmallestSample = GMC_SMALLEST_SAMPLE;
constexpr int64_t kLargestSample = 32768;
constexpr int64_t kSampleTop = 64;    // of these, as many should be among the k largest
constexpr int64_t kSampleCost = 256;  // but no more than one element in so many is looked at

struct Sample {
  int64_t numel, runs, size;
  uint32_t stretch, rest;  // numel / runs and numel % runs

  GMC_HD Sample(int64_t numel, int64_t k) : numel(numel) {
    size = (numel + k - 1) / k * kSampleTop;
    const int64_t dear = numel / kSampleCost;
    size = size < dear ? size : dear;
    size = size < kLargestSample ? size : kLargestSample;
    size = size > kSmallestSample ? size : kSmallestSample;
    runs = size / kRun;
    size = runs * kRun;
    if (size >= numel) {  // all of it
      size = numel;
      runs = (numel + kRun - 1) / kRun;
    }
    stretch = static_cast<uint32_t>(numel) / static_cast<uint32_t>(runs);
    rest = static_cast<uint32_t>(numel) % static_cast<uint32_t>(runs);
  }

  // Where a run begins.
  GMC_HD uint32_t place(uint32_t run) const {
    if (size == numel) return run * static_cast<uint32_t>(kRun);
    const uint32_t begin = stretch_begin(run);
    const auto room = static_cast<int32_t>(stretch_begin(run + 1) - begin - kRun);
    const uint32_t scattered = run * 2654435761u >> 8;
    return begin + (room > 0 ? scattered % static_cast<uint32_t>(room) : 0);
  }

  // numel * run / runs, rounded down, in 32 bits: runs * runs is 2**22 at most.
  GMC_HD uint32_t stretch_begin(uint32_t run) const {
    return stretch * run + rest * run / static_cast<uint32_t>(runs);
  }
};

// v of global momentum, without the aggregate, whose entries take too long to find. g: g' of
// rule.h. w: zero without weight decay.
GMC_HD float sampled_value(float u, float g, float w, const RuleOptions& options) {
  return add_scaled(add(decayed(u, options), g), options.weight_decay, w);
}

// v of local momentum.
GMC_HD float sampled_value(float u, float g, float w, float m, float momentum,
                           const RuleOptions& options) {
  g = add_scaled(g, options.weight_decay, w);
  return local_momentum_value(decayed(u, options), g, next_momentum(m, g, momentum), momentum,
                              options);
}

// ---------------------------------------------------------------------------------------------
// The policy.
// ---------------------------------------------------------------------------------------------

constexpr float kSurplus = 1.2f;  // candidates aimed at, over k, where k is large
constexpr float kSteady = 0.25f;  // change of the gradient's scale, as a share of the larger

GMC_HD float clamped(float x, float low, float high) { return fminf(fmaxf(x, low), high); }

// Candidates to aim at, over k. Small k get more, because the count near the k-th is noisy.
GMC_HD float surplus(int64_t k) { return kSurplus + 3.0f / sqrtf(static_cast<float>(k)); }

// How far the guess should be below the k-th magnitude, as a share. The number of entries above a
// magnitude is taken to fall off exponentially near the k-th.
GMC_HD float distance_below(const Guess& guess, int64_t k) {
  return fminf(guess.distance * logf(surplus(k)) / logf(kSurplus) * guess.caution, 0.9f);
}

// What the carried guess is for this k; 0: nothing is known.
GMC_HD float carried_guess(const Guess& guess, int64_t k) {
  if (guess.kth == 0.0f) return 0.0f;
  const float growth = guess.growth / (1.0f + 2.0f * fmaxf(guess.growth, 0.0f));
  const float ratio = static_cast<float>(guess.k) / static_cast<float>(k);
  return guess.kth * (1.0f + growth) * powf(ratio, guess.distance / logf(kSurplus)) *
         (1.0f - distance_below(guess, k));
}

// Chooses a call's guess. Sampled has three functions: reaching(key) is about how many of the
// sample have this key or a larger one; at(n) is a key that about n reach, or 0 if the sample has
// no more than n that are not zero; gradient() is the sum of |g'|.
template <class Sampled>
GMC_HD Guess choose_guess(Guess guess, int64_t k, const Sample& sample, const Sampled& sampled) {
  guess.rate = static_cast<float>(sample.size) / static_cast<float>(sample.numel);
  guess.carried = carried_guess(guess, k);
  const float expected = static_cast<float>(k) * guess.rate;
  const float before = guess.gradient;
  guess.gradient = sampled.gradient() / guess.rate;
  const float change = fabsf(guess.gradient - before);
  const bool steady = change <= kSteady * fmaxf(guess.gradient, before);
  const bool whole = sample.size == sample.numel;  // a whole sample is exact
  if (steady && !whole && guess.trusted && guess.carried > 0.0f &&
      guess.carried < bits_float(kInfKey)) {
    guess.key = float_bits(guess.carried);
    guess.in_sample = sampled.reaching(guess.key);
    // Too few candidates cost more than too many.
    const float fitting = surplus(k) * expected * (1.0f - guess.unseen), deviation = sqrtf(fitting);
    if (fitting - 1.5f * deviation - 1.0f <= guess.in_sample &&
        guess.in_sample <= fitting + 3.0f * deviation + 1.0f)
      return guess;
  }
  guess.in_sample = 1.1f * expected + 3.0f * sqrtf(expected) + 2.0f;
  if (whole) guess.in_sample = surplus(k) * expected + 1.0f;
  guess.key = sampled.at(guess.in_sample);
  if (guess.key == 0) guess.key = 1;
  return guess;
}

// Learns from a call after it. threshold: the k-th largest key. found: how many reached the guess.
// repaired: whether they were too few, or more than there was room for.
GMC_HD void learn(Guess* guess, uint32_t threshold, int64_t k, int64_t found, bool repaired) {
  const float kth = bits_float(threshold), before = guess->kth;
  // A repair costs far more than a few candidates too many.
  guess->caution = fmaxf(1.0f, 0.97f * guess->caution);
  if (repaired) {
    ++guess->repairs;
    if (found < k) guess->caution = fminf(2.0f * guess->caution, 16.0f);
  } else if (kth > 0.0f && found >= k) {
    const float many = static_cast<float>(found) / static_cast<float>(k);
    const float distance = 1.0f - bits_float(guess->key) / kth;
    guess->distance = distance * logf(kSurplus) / logf(fmaxf(many, 1.02f));
    const float seen = guess->in_sample / (guess->rate * static_cast<float>(found));
    guess->unseen += 0.25f * (clamped(1.0f - seen, 0.0f, 0.95f) - guess->unseen);
  }
  guess->distance = guess->distance == 0.0f ? 0.05f : clamped(guess->distance, 0.001f, 0.9f);
  // While memory fills up, the k-th magnitude grows by nearly the same amount in each step, so its
  // growth as a share shrinks, and the smoothed one lags behind.
  const bool comparable = before > 0.0f && kth > 0.0f && guess->k == k;
  const float growth = comparable ? clamped(1.0f - before / kth, -0.2f, 0.5f) : 0.0f;
  guess->trusted =
      before == 0.0f ||
      (guess->carried <= kth && guess->carried > kth * (1.0f - 3.0f * distance_below(*guess, k)));
  guess->growth = guess->trusted ? 0.5f * (guess->growth + growth) : 0.0f;
  guess->kth = kth;
  guess->k = static_cast<uint32_t>(k);
}

}  // namespace gmc
