// The look makes this call's guess from a sample of v (guess.h) and from what is carried. It is one
// block for each range, and the pass waits for it only after its own loads have arrived.
#include "block.cuh"
#include "compress.h"
#include "launch.h"

namespace gmc::cuda {
namespace {

struct LookShared {
  uint32_t bins[kCoarseBins];
  FindShared<kLookThreads> find;
  uint32_t warp_sums[kLookThreads / 32];
  float gradient_sums[kLookThreads / 32];
};

// An element of one of a bucket's tensors, loaded as it is stored, so that several loads are under
// way before the first is converted.
struct StoredElement {
  uint32_t word;
  DType dtype;

  StoredElement() = default;
  __device__ StoredElement(const SegmentList& list, const RuleArgs& args, uint32_t i) {
    const TableSegment* const segments = list.begin(args.own);
    const TableSegment segment = segments[find_segment(segments, list.count, i)];
    const uint32_t place = i - segment.begin;
    dtype = segment.dtype;
    word = 0;
    if (segment.data)
      word = dtype == DType::kFloat32 ? static_cast<const uint32_t*>(segment.data)[place]
                                      : static_cast<const uint16_t*>(segment.data)[place];
  }

  __device__ float value() const {
    return dtype == DType::kFloat32 ? bits_float(word) : load_value(&word, dtype, 0);
  }
};

constexpr int kBatch = 4;  // elements of a thread that are loaded at once

// The sample in bins of 1/32 of an octave. All threads of the block make it, and all call its
// functions.
class BinnedSample {
 public:
  __device__ BinnedSample(const RuleArgs& args, uint32_t begin, const Sample& sample,
                          LookShared* shared)
      : shared_(shared) {
    clear_bins<kCoarseBins>(shared->bins);
    __syncthreads();
    const bool overflowed = args.found_inf.load() != 0.0f, decays = args.params.count != 0;
    const float factor = gradient_factor(args.grad_scale.load(), args.options);
    const float momentum = args.momentum.load();
    float gradient = 0.0f;
    uint32_t ignored = 0;
    const auto size = static_cast<uint32_t>(sample.size);
    for (uint32_t first = threadIdx.x; first < size; first += kBatch * kLookThreads) {
      uint32_t i[kBatch];
      float u[kBatch];
      StoredElement stored[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const uint32_t n = min(first + j * kLookThreads, size - 1);
        i[j] = begin + sample.place(n / kRun) + n % kRun;
        u[j] = args.memory[i[j]];
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) stored[j] = StoredElement(args.grads, args, i[j]);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (first + j * kLookThreads >= size) break;
        const float g = overflowed ? 0.0f : scaled_gradient(stored[j].value(), factor, &ignored);
        const float w = decays ? StoredElement(args.params, args, i[j]).value() : 0.0f;
        const float v = args.momentum_buffer ? sampled_value(u[j], g, w, args.momentum_buffer[i[j]],
                                                             momentum, args.options)
                                             : sampled_value(u[j], g, w, args.options);
        gradient += fabsf(g);
        atomicAdd(&shared->bins[magnitude_key(finite_or_zero(v)) >> kCoarseShift], 1u);
      }
    }
    // After the barrier in this sum, all of the sample is in its bins.
    block_exclusive_sum<kLookThreads>(gradient, &gradient_, shared->gradient_sums);
  }

  __device__ float gradient() const { return gradient_; }

  __device__ float reaching(uint32_t key) const {
    const uint32_t own = key >> kCoarseShift;
    uint32_t above = 0, total;
    for (uint32_t bin = threadIdx.x; bin < kCoarseBins; bin += kLookThreads)
      above += bin > own ? shared_->bins[bin] : 0;
    block_exclusive_sum<kLookThreads>(above, &total, shared_->warp_sums);
    const float below = static_cast<float>(key % kWidth) / static_cast<float>(kWidth);
    return static_cast<float>(total) + (1.0f - below) * static_cast<float>(shared_->bins[own]);
  }

  __device__ uint32_t at(float count) const {
    const uint32_t wanted = static_cast<uint32_t>(count) + 1;
    const FoundBin found = find_bin<kCoarseBins>(shared_->bins, wanted, &shared_->find);
    if (found.bin == 0) return 0;  // also where the sample has not as many
    const float share =
        static_cast<float>(wanted - found.above) / static_cast<float>(shared_->bins[found.bin]);
    return (found.bin << kCoarseShift) +
           static_cast<uint32_t>((1.0f - share) * static_cast<float>(kWidth - 1));
  }

 private:
  static constexpr uint32_t kWidth = 1u << kCoarseShift;

  LookShared* const shared_;
  float gradient_;
};

__global__ void __launch_bounds__(kLookThreads, 1)
    look_kernel(const __grid_constant__ CompressArgs args) {
  static __shared__ LookShared shared;
  start_next();
  const OwnRange range(args);
  Control* const control = range.workspace.control;
  if (args.fresh) {
    auto* const words = reinterpret_cast<uint32_t*>(control);
    for (uint32_t i = threadIdx.x; i < kZeroBytes / 4; i += kLookThreads) words[i] = 0;
  }
  const Sample sample(range.numel, range.k);
  const BinnedSample binned(args.rule, range.begin, sample, &shared);
  const Guess guess = choose_guess(control->guess, range.k, sample, binned);
  if (threadIdx.x != 0) return;
  control->guess = guess;
  control->scale = guess.scale;
  control->nonfinite = 0;
}

}  // namespace

void look(const CompressArgs& args, const Stream& stream) {
  launch(look_kernel, {1, args.ranges.count}, kLookThreads, stream, args);
}

}  // namespace gmc::cuda
