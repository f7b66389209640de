// The loops over every element, written so that the compiler vectorises them. loops.cpp includes
// this file once per instruction set, with GMC_TARGET naming it; there is no include guard.

// x = a gradient's value times factor, zero where that is not finite.
template <DType dtype>
GMC_TARGET static inline float gradient_value(const void* grads, int64_t i, float factor,
                                              uint32_t* nonfinite) {
  const float x = load_value(grads, dtype, i) * factor;
  const bool finite = is_finite(x);
  *nonfinite += !finite;
  return finite ? x : 0.0f;
}

template <DType dtype>
GMC_TARGET static uint32_t load_gradient_as(float* out, const void* grads, float factor,
                                            int64_t n) {
  uint32_t nonfinite = 0;
  for (int64_t i = 0; i < n; ++i) out[i] = gradient_value<dtype>(grads, i, factor, &nonfinite);
  return nonfinite;
}

// Returns how many values were not finite.
GMC_TARGET static uint32_t load_gradient(float* out, const void* grads, DType dtype, float factor,
                                         int64_t n) {
  switch (dtype) {
    case DType::kBFloat16:
      return load_gradient_as<DType::kBFloat16>(out, grads, factor, n);
    case DType::kFloat16:
      return load_gradient_as<DType::kFloat16>(out, grads, factor, n);
    default:
      return load_gradient_as<DType::kFloat32>(out, grads, factor, n);
  }
}

// Global momentum's accumulation: value = (value + g') + 0, in place. Adding +0 turns -0 into +0,
// so that an aggregate's missing entries equal entries of zero. Keeps the old values in `before`,
// and returns the largest key, which tells whether every value is finite.
template <DType dtype>
GMC_TARGET static uint32_t accumulate_as(float* __restrict value, float* __restrict before,
                                         const void* grads, float factor, int64_t n,
                                         uint32_t* nonfinite) {
  uint32_t largest = 0, bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float grad = gradient_value<dtype>(grads, i, factor, &bad);
    before[i] = value[i];
    value[i] = (value[i] + grad) + 0.0f;
    const uint32_t key = magnitude_key(value[i]);
    largest = key > largest ? key : largest;
  }
  *nonfinite += bad;
  return largest;
}

GMC_TARGET static uint32_t accumulate(float* value, float* before, const void* grads, DType dtype,
                                      float factor, int64_t n, uint32_t* nonfinite) {
  switch (dtype) {
    case DType::kBFloat16:
      return accumulate_as<DType::kBFloat16>(value, before, grads, factor, n, nonfinite);
    case DType::kFloat16:
      return accumulate_as<DType::kFloat16>(value, before, grads, factor, n, nonfinite);
    default:
      return accumulate_as<DType::kFloat32>(value, before, grads, factor, n, nonfinite);
  }
}

// value = (value + weight_decay * w) + zero; returns the largest key. zero is -0, which changes
// nothing, or +0, which settles the sign of a sum of zero.
template <DType dtype>
GMC_TARGET static uint32_t add_decay_as(float* value, const void* params, float weight_decay,
                                        float zero, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    value[i] = (value[i] + weight_decay * load_value(params, dtype, i)) + zero;
    const uint32_t key = magnitude_key(value[i]);
    largest = key > largest ? key : largest;
  }
  return largest;
}

GMC_TARGET static uint32_t add_decay(float* value, const void* params, DType dtype,
                                     float weight_decay, float zero, int64_t n) {
  switch (dtype) {
    case DType::kBFloat16:
      return add_decay_as<DType::kBFloat16>(value, params, weight_decay, zero, n);
    case DType::kFloat16:
      return add_decay_as<DType::kFloat16>(value, params, weight_decay, zero, n);
    default:
      return add_decay_as<DType::kFloat32>(value, params, weight_decay, zero, n);
  }
}

// DGC: m = momentum * m + g; value = (value + m) + 0, with Nesterov's look-ahead
// value = ((value + g) + momentum * m) + 0, both in place. Keeps the old value and m; returns the
// largest key of value, which is not finite where m is not.
GMC_TARGET static uint32_t local_momentum(float* __restrict value, float* __restrict before,
                                          float* __restrict buffer, float* __restrict buffer_before,
                                          const float* __restrict grad, float momentum,
                                          bool nesterov, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    before[i] = value[i];
    buffer_before[i] = buffer[i];
    buffer[i] = momentum * buffer[i] + grad[i];
    const float ahead = (value[i] + grad[i]) + momentum * buffer[i];
    value[i] = (nesterov ? ahead : value[i] + buffer[i]) + 0.0f;
    const uint32_t key = magnitude_key(value[i]);
    largest = key > largest ? key : largest;
  }
  return largest;
}

// Bit j is set where the key of value[j] reaches the threshold, for 16 values.
GMC_TARGET static inline uint32_t reaching(const float* value, uint32_t threshold) {
#if defined(GMC_AVX512)
  const __m512i keys = _mm512_and_si512(_mm512_loadu_si512(value), _mm512_set1_epi32(0x7fffffff));
  return _mm512_cmpge_epu32_mask(keys, _mm512_set1_epi32(static_cast<int>(threshold)));
#elif defined(GMC_AVX2)
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  const __m256i below = _mm256_set1_epi32(static_cast<int>(threshold) - 1);
  uint32_t bits = 0;
  for (int half = 0; half < 2; ++half) {
    const auto* at = reinterpret_cast<const __m256i*>(value + 8 * half);
    const __m256i keys = _mm256_and_si256(_mm256_loadu_si256(at), magnitude);
    const __m256 reached = _mm256_castsi256_ps(_mm256_cmpgt_epi32(keys, below));
    bits |= static_cast<uint32_t>(_mm256_movemask_ps(reached)) << (8 * half);
  }
  return bits;
#else
  uint32_t largest = 0;
  for (int j = 0; j < 16; ++j) {
    const uint32_t key = magnitude_key(value[j]);
    largest = key > largest ? key : largest;
  }
  if (largest < threshold) return 0;
  uint32_t bits = 0;
  for (int j = 0; j < 16; ++j)
    bits |= static_cast<uint32_t>(magnitude_key(value[j]) >= threshold) << j;
  return bits;
#endif
}

// Adds momentum * the aggregate's entries; their indices count from value - origin. Returns the
// largest key among the sums.
GMC_TARGET static uint32_t add_entries(float* value, int64_t origin, const uint16_t* indices,
                                       const float* entries, int64_t count, float momentum) {
  uint32_t largest = 0;
  for (int64_t entry = 0; entry < count; ++entry) {
    float& sum = value[indices[entry] - origin];
    sum = (sum + momentum * entries[entry]) + 0.0f;
    const uint32_t key = magnitude_key(sum);
    largest = key > largest ? key : largest;
  }
  return largest;
}

// Writes index and bits of every value whose key reaches the threshold, and returns how many. May
// write up to 16 places more. Meanwhile it fetches what the next chunk will read, so that the
// memory bus is not idle: the values behind these, and next_grads (grad_size bytes each).
GMC_TARGET static int64_t collect(const float* value, int64_t n, uint32_t first_index,
                                  uint32_t threshold, uint32_t* index, uint32_t* bits,
                                  const char* next_grads, int64_t grad_size) {
  int64_t count = 0;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    __builtin_prefetch(value + n + i, 1);
    __builtin_prefetch(next_grads + i * grad_size);
    uint32_t found = reaching(value + i, threshold);
#if defined(GMC_AVX512)
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i indices =
        _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(first_index + i)));
    const auto mask = static_cast<__mmask16>(found);
    _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(mask, indices));
    _mm512_storeu_si512(bits + count,
                        _mm512_maskz_compress_epi32(mask, _mm512_loadu_si512(value + i)));
    count += __builtin_popcount(found);
#else
    for (; found; found &= found - 1) {
      const int64_t at = i + __builtin_ctz(found);
      index[count] = first_index + static_cast<uint32_t>(at);
      bits[count++] = float_bits(value[at]);
    }
#endif
  }
  for (; i < n; ++i) {
    if (magnitude_key(value[i]) < threshold) continue;
    index[count] = first_index + static_cast<uint32_t>(i);
    bits[count++] = float_bits(value[i]);
  }
  return count;
}

GMC_TARGET static constexpr Loops table() {
  return {load_gradient, accumulate, add_decay, local_momentum, add_entries, collect};
}
