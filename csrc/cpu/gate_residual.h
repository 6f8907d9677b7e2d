#pragma once

#include <cstdint>

#include "multiversion.h"

namespace dgpo_fast::cpu {

// x + gate y of one row.
template <typename math_t, typename scalar_t>
DGPO_FAST_MULTIVERSION void add_gated(const scalar_t* x, const scalar_t* y, const scalar_t* gate, scalar_t* hidden,
                                      int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    hidden[i] = static_cast<scalar_t>(static_cast<math_t>(x[i]) +
                                      static_cast<math_t>(gate[i]) * static_cast<math_t>(y[i]));
}

// The gradient of y, gate grad, of one row.
template <typename math_t, typename grad_t, typename scalar_t>
DGPO_FAST_MULTIVERSION void gate_backward(const grad_t* grad, const scalar_t* gate, scalar_t* grad_y, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    grad_y[i] = static_cast<scalar_t>(static_cast<math_t>(grad[i]) * static_cast<math_t>(gate[i]));
}

// Adds a row's share to the sum over rows that is the gradient of the gate.
template <typename math_t, typename grad_t, typename scalar_t>
DGPO_FAST_MULTIVERSION void add_gate_gradient(const grad_t* grad, const scalar_t* y, math_t* gate_sum, int64_t n) {
  for (int64_t i = 0; i < n; ++i) gate_sum[i] += static_cast<math_t>(grad[i]) * static_cast<math_t>(y[i]);
}

}  // namespace dgpo_fast::cpu
