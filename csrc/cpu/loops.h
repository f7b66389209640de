// The loops over every element, written so that the compiler vectorises them. loops.cpp includes
// this file once per instruction set, with GMC_TARGET naming it; there is no include guard.

// Loops that change `value` return the largest key of what they leave there, which tells whether
// all of it is finite.

GMC_TARGET static inline void keep_largest(uint32_t* largest, float x) {
  const uint32_t key = magnitude_key(x);
  *largest = key > *largest ? key : *largest;
}

// out = g'; counts what was not finite.
template <class Format>
GMC_TARGET static void load_gradient_as(float* out, const void* grads, float factor, int64_t n,
                                        uint32_t* nonfinite) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) out[i] = scaled_gradient(load_as<Format>(grads, i), factor, &bad);
  *nonfinite += bad;
}

GMC_TARGET static void load_gradient(float* out, const void* grads, DType dtype, float factor,
                                     int64_t n, uint32_t* nonfinite) {
  with_dtype(dtype, [=](auto format) {
    load_gradient_as<decltype(format)>(out, grads, factor, n, nonfinite);
  });
}

// value = (d * value + factor * grad) + 0, in place; keeps the old values in `before`. The result
// is not finite where the gradient is not. Options go by value: the compiler then knows that no
// store changes them.
template <class Format>
GMC_TARGET static uint32_t add_gradient_as(float* __restrict value, float* __restrict before,
                                           RuleOptions options, const void* grads, float factor,
                                           int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    before[i] = value[i];
    const float u = decayed(value[i], options);
    value[i] = settle(add_scaled(u, factor, load_as<Format>(grads, i)));
    keep_largest(&largest, value[i]);
  }
  return largest;
}

GMC_TARGET static uint32_t add_gradient(float* value, float* before, RuleOptions options,
                                        const void* grads, DType dtype, float factor, int64_t n) {
  return with_dtype(dtype, [=](auto format) {
    return add_gradient_as<decltype(format)>(value, before, options, grads, factor, n);
  });
}

// value = (value + factor * other) + zero. zero is -0, which changes nothing, or +0, which settles
// the sign of a sum of zero.
template <class Format>
GMC_TARGET static uint32_t add_multiple_as(float* value, const void* other, float factor,
                                           float zero, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    value[i] = add(add_scaled(value[i], factor, load_as<Format>(other, i)), zero);
    keep_largest(&largest, value[i]);
  }
  return largest;
}

GMC_TARGET static uint32_t add_multiple(float* value, const void* other, DType dtype, float factor,
                                        float zero, int64_t n) {
  return with_dtype(dtype, [=](auto format) {
    return add_multiple_as<decltype(format)>(value, other, factor, zero, n);
  });
}

// One step of local momentum, in place; keeps the old value and m. value is not finite where m is
// not.
GMC_TARGET static uint32_t local_momentum(float* __restrict value, float* __restrict before,
                                          float* __restrict buffer, float* __restrict buffer_before,
                                          const float* __restrict grad, float momentum,
                                          RuleOptions options, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    before[i] = value[i];
    buffer_before[i] = buffer[i];
    buffer[i] = next_momentum(buffer[i], grad[i], momentum);
    const float u = decayed(value[i], options);
    value[i] = settle(local_momentum_value(u, grad[i], buffer[i], momentum, options));
    keep_largest(&largest, value[i]);
  }
  return largest;
}

// Adds momentum times those of the aggregate's `count` entries, from *entry on, whose indices are
// below origin + n, and moves *entry past them. value[0] has index origin.
GMC_TARGET static uint32_t add_entries(float* value, int64_t origin, int64_t n,
                                       const uint16_t* indices, const float* entries, int64_t count,
                                       float momentum, int64_t* entry) {
  uint32_t largest = 0;
  int64_t e = *entry;
  for (; e < count && indices[e] < origin + n; ++e) {
    float& sum = value[indices[e] - origin];
    sum = settle(add_scaled(sum, momentum, entries[e]));
    keep_largest(&largest, sum);
  }
  *entry = e;
  return largest;
}

// The step of a dense bucket after the sum: total becomes the mean, the parameters move, memory
// becomes zero.
template <class Format>
GMC_TARGET static void apply_dense_as(float* __restrict total, float* __restrict memory,
                                      typename Format::Word* __restrict params, float factor,
                                      float lr, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float mean = multiply(total[i], factor);
    total[i] = mean;
    memory[i] = 0.0f;
    params[i] = Format::round(moved(Format::to_float(params[i]), lr, mean));
  }
}

GMC_TARGET static void apply_dense(float* total, float* memory, void* params, DType dtype,
                                   float factor, float lr, int64_t n) {
  with_dtype(dtype, [=](auto format) {
    using Format = decltype(format);
    apply_dense_as<Format>(total, memory, static_cast<typename Format::Word*>(params), factor, lr,
                           n);
  });
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

// Writes index and bits of every value whose key reaches the threshold, and returns how many. May
// write up to 16 places more. Meanwhile it fetches what the next chunk will read, so that the
// memory bus is not idle: the values after these, and next_grads (grad_size bytes each).
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
  return {load_gradient, add_gradient, add_multiple, local_momentum,
          add_entries,   apply_dense,  collect};
}
