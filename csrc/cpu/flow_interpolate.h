#pragma once

#include <cstdint>

#include "multiversion.h"

namespace dgpo_fast::cpu {

// x_t and, unless it is null, v* of `n` elements of one sample, in the precision `math_t`.
template <typename math_t, typename sample_t, typename noise_t>
DGPO_FAST_MULTIVERSION void interpolate(const sample_t* x0, const noise_t* noise, math_t sigma, sample_t* x_t,
                                        sample_t* target, int64_t n) {
  const math_t rest = 1 - sigma;
  for (int64_t i = 0; i < n; ++i) {
    const math_t x = static_cast<math_t>(x0[i]), eps = static_cast<math_t>(noise[i]);
    x_t[i] = static_cast<sample_t>(rest * x + sigma * eps);
  }
  if (target == nullptr) return;
  for (int64_t i = 0; i < n; ++i)
    target[i] = static_cast<sample_t>(static_cast<math_t>(noise[i]) - static_cast<math_t>(x0[i]));
}

// Element-wise: the gradient with respect to x0; `grad_target` may be null.
template <typename math_t, typename grad_t>
DGPO_FAST_MULTIVERSION void interpolate_backward(const grad_t* grad_x_t, const grad_t* grad_target, math_t sigma,
                                                 grad_t* grad_x0, int64_t n) {
  const math_t rest = 1 - sigma;
  if (grad_target == nullptr) {
    for (int64_t i = 0; i < n; ++i) grad_x0[i] = static_cast<grad_t>(rest * static_cast<math_t>(grad_x_t[i]));
    return;
  }
  for (int64_t i = 0; i < n; ++i)
    grad_x0[i] =
        static_cast<grad_t>(rest * static_cast<math_t>(grad_x_t[i]) - static_cast<math_t>(grad_target[i]));
}

}  // namespace dgpo_fast::cpu
