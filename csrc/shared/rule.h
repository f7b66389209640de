// What v is for one element: the rule of the optimizer, for every backend. Each operation is
// rounded to float32 on its own, in the order written here.
//
//   global momentum (GMC)   v = ((d * u + g') + lambda * w) + beta * a
//   local momentum (DGC)    g'' = g' + lambda * w,   m = beta * m + g'',
//                           v = d * u + m, or with Nesterov's look-ahead (d * u + g'') + beta * m
//
// and then v + 0. Where v is not finite, u and m stay as they were (zero if they are not finite):
// u does not decay either.
#pragma once

#include "shared/numbers.h"

namespace gmc {

// The numbers of the rule that the host always knows.
struct RuleOptions {
  float weight_decay;  // lambda
  float memory_decay;  // d
  bool maximize;       // ascend
  bool nesterov;       // look ahead; local momentum only
};

// No compiler may contract add, multiply and subtract into a fused operation.
GMC_HD float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

GMC_HD float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

GMC_HD float subtract(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fsub_rn(a, b);
#else
  return a - b;
#endif
}

// What a gradient is multiplied by.
GMC_HD float gradient_factor(float grad_scale, const RuleOptions& options) {
#if defined(__CUDA_ARCH__)
  const float inverse = __fdiv_rn(1.0f, grad_scale);
#else
  const float inverse = 1.0f / grad_scale;
#endif
  return options.maximize ? -inverse : inverse;
}

// g' = g * factor, or zero where that is not finite, which is counted.
GMC_HD float scaled_gradient(float g, float factor, uint32_t* nonfinite) {
  const float scaled = multiply(g, factor);
  *nonfinite += !is_finite(scaled);
  return finite_or_zero(scaled);
}

// d * u. It is exact for d = 1, so that no rule without it is needed.
GMC_HD float decayed(float u, const RuleOptions& options) {
  return multiply(options.memory_decay, u);
}

// x + lambda * w, and x + beta * a.
GMC_HD float add_scaled(float x, float factor, float y) { return add(x, multiply(factor, y)); }

GMC_HD float next_momentum(float m, float g, float momentum) {
  return add(multiply(momentum, m), g);
}

// v of local momentum. u: decayed. m: already that of this step.
GMC_HD float local_momentum_value(float u, float g, float m, float momentum,
                                  const RuleOptions& options) {
  const float ahead = add_scaled(add(u, g), momentum, m);
  return options.nesterov ? ahead : add(u, m);
}

// Turns -0 into +0, so that an aggregate's missing entries equal entries of zero.
GMC_HD float settle(float v) { return add(v, 0.0f); }

// What stays in memory of a value that is sent.
template <class Format>
GMC_HD float left_behind(float value, int scale) {
  return subtract(value, Format::decode(Format::encode(value, scale), scale));
}

// What a sum over ranks is multiplied by.
GMC_HD float mean_factor(int64_t ranks) {
  return static_cast<float>(1.0 / static_cast<double>(ranks));
}

// w - lr * a.
GMC_HD float moved(float w, float lr, float a) { return subtract(w, multiply(lr, a)); }

}  // namespace gmc
