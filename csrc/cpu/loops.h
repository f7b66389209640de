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

template <DType dtype>
GMC_TARGET static void add_decay_as(float* grad, const void* params, float weight_decay,
                                    int64_t n) {
  for (int64_t i = 0; i < n; ++i) grad[i] += weight_decay * load_value(params, dtype, i);
}

GMC_TARGET static void add_decay(float* sum, const void* params, DType dtype, float weight_decay,
                                 int64_t n) {
  switch (dtype) {
    case DType::kBFloat16:
      return add_decay_as<DType::kBFloat16>(sum, params, weight_decay, n);
    case DType::kFloat16:
      return add_decay_as<DType::kFloat16>(sum, params, weight_decay, n);
    default:
      return add_decay_as<DType::kFloat32>(sum, params, weight_decay, n);
  }
}

// sum += memory
GMC_TARGET static void add_memory(float* __restrict sum, const float* __restrict memory,
                                  int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] = memory[i] + sum[i];
}

// DGC: buffer = momentum * old + grad; value = memory + buffer, with Nesterov's look-ahead
// value = (memory + grad) + momentum * buffer. value holds grad on entry.
GMC_TARGET static void local_momentum(float* __restrict value, float* __restrict buffer,
                                      const float* __restrict memory, const float* __restrict old,
                                      float momentum, bool nesterov, int64_t n) {
  if (nesterov) {
    for (int64_t i = 0; i < n; ++i) {
      buffer[i] = momentum * old[i] + value[i];
      value[i] = (memory[i] + value[i]) + momentum * buffer[i];
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      buffer[i] = momentum * old[i] + value[i];
      value[i] = memory[i] + buffer[i];
    }
  }
}

// Adding +0 turns -0 into +0, so that an aggregate's missing entries equal entries of zero.
// Returns whether every value is finite.
GMC_TARGET static bool settle(float* value, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    value[i] = value[i] + 0.0f;
    const uint32_t key = magnitude_key(value[i]);
    largest = key > largest ? key : largest;
  }
  return largest < kInfKey;
}

// Appends index and key of every value whose key reaches the threshold. Writes up to n places
// past index and key, whatever it returns.
GMC_TARGET static int64_t collect(const float* value, int64_t n, uint32_t first_index,
                                  uint32_t threshold, uint32_t* index, uint32_t* key) {
  constexpr int64_t kGroup = 32;
  int64_t count = 0;
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) {
    uint32_t largest = 0;
    for (int64_t j = 0; j < kGroup; ++j) {
      const uint32_t magnitude = magnitude_key(value[i + j]);
      largest = magnitude > largest ? magnitude : largest;
    }
    if (largest < threshold) continue;
    for (int64_t j = 0; j < kGroup; ++j) {
      const uint32_t magnitude = magnitude_key(value[i + j]);
      index[count] = first_index + static_cast<uint32_t>(i + j);
      key[count] = magnitude;
      count += magnitude >= threshold;
    }
  }
  for (; i < n; ++i) {
    const uint32_t magnitude = magnitude_key(value[i]);
    index[count] = first_index + static_cast<uint32_t>(i);
    key[count] = magnitude;
    count += magnitude >= threshold;
  }
  return count;
}

GMC_TARGET static constexpr Loops table() {
  return {load_gradient, add_decay, add_memory, local_momentum, settle, collect};
}
