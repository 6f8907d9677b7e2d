#pragma once

#include <cmath>
#include <cstdint>

#include "lanes.h"
#include "multiversion.h"

namespace dgpo_fast::cpu {

// Writes the row x with mean 0 and variance 1 to `standard`, and returns what it was multiplied with. Two passes over
// the row, which lies in the cache: the variance is the mean of squared deviations.
template <typename math_t, typename scalar_t>
DGPO_FAST_MULTIVERSION math_t standardise(const scalar_t* x, math_t eps, math_t* standard, int64_t n) {
  const math_t sum = sum_in_lanes<math_t>(n, [&](int64_t i) { return standard[i] = static_cast<math_t>(x[i]); });
  const math_t mean = sum / static_cast<math_t>(n);
  const math_t squares = sum_in_lanes<math_t>(n, [&](int64_t i) {
    standard[i] -= mean;
    return standard[i] * standard[i];
  });
  const math_t rstd = 1 / std::sqrt(squares / static_cast<math_t>(n) + eps);
  for (int64_t i = 0; i < n; ++i) standard[i] *= rstd;
  return rstd;
}

// The modulated layer norm of the row x; `standard` is room for n numbers.
template <typename math_t, typename scalar_t>
DGPO_FAST_MULTIVERSION void norm_modulate(const scalar_t* x, const scalar_t* shift, const scalar_t* scale, math_t eps,
                                          math_t* standard, scalar_t* y, int64_t n) {
  standardise(x, eps, standard, n);
  for (int64_t i = 0; i < n; ++i)
    y[i] = static_cast<scalar_t>(standard[i] * (1 + static_cast<math_t>(scale[i])) + static_cast<math_t>(shift[i]));
}

// The gradient of the row x by way of its modulated layer norm, whose gradient is `grad`. `standard` becomes the
// standardised row.
template <typename math_t, typename scalar_t>
DGPO_FAST_MULTIVERSION void norm_modulate_backward(const scalar_t* grad, const scalar_t* x, const scalar_t* scale,
                                                   math_t eps, math_t* standard, math_t* grad_x, int64_t n) {
  const math_t rstd = standardise(x, eps, standard, n);
  const math_t sum = sum_in_lanes<math_t>(n, [&](int64_t i) {
    return grad_x[i] = static_cast<math_t>(grad[i]) * (1 + static_cast<math_t>(scale[i]));
  });
  // What changes only the mean or the variance of x changes nothing: it is taken out.
  const math_t mean = sum / static_cast<math_t>(n);
  const math_t along =
      sum_in_lanes<math_t>(n, [&](int64_t i) { return grad_x[i] * standard[i]; }) / static_cast<math_t>(n);
  for (int64_t i = 0; i < n; ++i) grad_x[i] = rstd * (grad_x[i] - mean - along * standard[i]);
}

// Adds a row's share to the sums over rows that are the gradients of shift and scale.
template <typename math_t, typename scalar_t>
DGPO_FAST_MULTIVERSION void add_modulation_gradients(const scalar_t* grad, const math_t* standard, math_t* shift_sum,
                                                     math_t* scale_sum, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    shift_sum[i] += static_cast<math_t>(grad[i]);
    scale_sum[i] += static_cast<math_t>(grad[i]) * standard[i];
  }
}

}  // namespace dgpo_fast::cpu
