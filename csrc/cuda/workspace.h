// What compress keeps on the device between and during calls for each range of a bucket: the state
// tensor, or a temporary.
// All zero means that nothing is known yet. Every call leaves the counters and histograms zero for
// the next one.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "shared/guess.h"
#include "sizes.h"

namespace gmc::cuda {

// A candidate is binned by how far its key lies above the guess: 2048 bins of 2048 keys reach half
// an octave. A last histogram then tells the keys of one bin apart.
constexpr int kBinBits = 11;
constexpr int kBins = 1 << kBinBits;
// Without a usable guess, 2**18 keys to a bin: 32 bins to an octave.
constexpr int kCoarseShift = 18;
constexpr int kCoarseBins = 1 << (31 - kCoarseShift);
// The scale of 8- and 4-bit values comes from the exponents of what is selected.
constexpr int kFields = 256;

// How good the guess was.
enum Outcome : uint32_t {
  kUseful,     // the pass's candidates and bins serve the selection
  kFewValues,  // fewer than k values are not zero, and all of them are candidates
  kUseless,    // too few candidates, too many, or the k-th beyond the bins: others are made, after
               // these were given back
};

struct Control {
  Guess guess;  // carried from call to call, but for the part that look writes
  // These are zero between calls.
  uint32_t found;    // candidates of the pass
  uint32_t refound;  // candidates of the repair
  // These are written in each call before they are read.
  uint32_t nonfinite;  // values counted as zero: in the first range's control, for all ranges
  int32_t scale;       // the one for which the pass takes candidates out of memory
  Outcome outcome;
  uint32_t from_memory;  // whether the selection's entries are all of memory, not the candidates
  uint32_t base;         // the key from which the bins count
  uint32_t bin_key;      // smallest key of the bin that holds the k-th
  uint32_t above_bin;    // entries above that bin
  uint32_t threshold;    // the k-th largest key
  uint32_t ties;         // how many entries equal to it are taken
};
static_assert(sizeof(Control) <= 256, "has 256 bytes");

struct Workspace {
  Control* control;
  uint32_t* pass_bins;         // [kBins] candidates of the pass
  uint32_t* repair_bins;       // [kBins] candidates of the repair
  uint32_t* low_bins;          // [kBins] entries in the bin that holds the k-th
  uint32_t* coarse_bins;       // [kCoarseBins] all of memory
  uint32_t* field_bins;        // [kFields] entries above the threshold; cleared before each use
  unsigned long long* groups;  // [kMaxGroups] entries above the threshold << 32 | equal to it
  uint32_t* selected;          // [work tiles] entries of one tile above it << 16 | equal to it
  uint2* tiles;                // [work tiles] where its candidates begin, and how many there are
  uint2* candidates;           // [capacity] index and value's bits
  uint32_t capacity;
};

// The workspaces of a bucket's ranges, one after the other.
struct Workspaces {
  Workspace first;
  int64_t nbytes;  // of each; a multiple of 16

  __device__ Workspace of_range(uint32_t range) const {
    Workspace w = first;
    const int64_t offset = range * nbytes;
    const auto move = [&](auto** pointer) {
      using Element = std::remove_reference_t<decltype(**pointer)>;
      *pointer = reinterpret_cast<Element*>(reinterpret_cast<uint8_t*>(*pointer) + offset);
    };
    move(&w.control);
    move(&w.pass_bins);
    move(&w.repair_bins);
    move(&w.low_bins);
    move(&w.coarse_bins);
    move(&w.field_bins);
    move(&w.groups);
    move(&w.selected);
    move(&w.tiles);
    move(&w.candidates);
    return w;
  }
};

constexpr int64_t kControlBytes = 256;
constexpr int64_t kClearedWords = 3 * kBins + kCoarseBins;  // from pass_bins on
constexpr int64_t kZeroBytes = kControlBytes + 4 * kClearedWords;

// The workspace's size without its candidates.
inline int64_t workspace_base_nbytes(int64_t numel) {
  const int64_t tiles = work_tile_count(numel);
  return kZeroBytes + 4 * kFields + 8 * kMaxGroups + pad16(4 * tiles) + 8 * tiles;
}

// The workspace has room for three times k candidates, while the guess aims at less than twice k.
inline int64_t workspace_nbytes(int64_t numel, int64_t k) {
  const int64_t wanted = 3 * k + 8192;
  return pad16(workspace_base_nbytes(numel) + 8 * (wanted < numel ? wanted : numel));
}

// nbytes: workspace_nbytes of this numel and of any k.
inline Workspace make_workspace(void* data, int64_t nbytes, int64_t numel) {
  const int64_t tiles = work_tile_count(numel);
  auto* at = static_cast<uint8_t*>(data);
  const auto take = [&at](int64_t nbytes) {
    uint8_t* const begin = at;
    at += nbytes;
    return static_cast<void*>(begin);
  };
  Workspace w;
  w.control = static_cast<Control*>(take(kControlBytes));
  w.pass_bins = static_cast<uint32_t*>(take(4 * kBins));
  w.repair_bins = static_cast<uint32_t*>(take(4 * kBins));
  w.low_bins = static_cast<uint32_t*>(take(4 * kBins));
  w.coarse_bins = static_cast<uint32_t*>(take(4 * kCoarseBins));
  w.field_bins = static_cast<uint32_t*>(take(4 * kFields));
  w.groups = static_cast<unsigned long long*>(take(8 * kMaxGroups));
  w.selected = static_cast<uint32_t*>(take(pad16(4 * tiles)));
  w.tiles = static_cast<uint2*>(take(8 * tiles));
  w.candidates = static_cast<uint2*>(take(0));
  w.capacity = static_cast<uint32_t>((nbytes - workspace_base_nbytes(numel)) / 8);
  return w;
}

}  // namespace gmc::cuda
