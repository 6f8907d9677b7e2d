#pragma once

#include <cmath>
#include <cstdint>

#include "exponential.h"
#include "multiversion.h"

namespace dgpo_fast::cpu {

// gelu(u) = u s and its derivative s + u z' s (1 - s), s = 1 / (1 + exp(-z)), z = 2 sqrt(2 / pi) (u + 0.044715 u^3).
// With e = exp(-|z|), the larger of s and 1 - s is 1 / (1 + e), the other e times that: nothing overflows or cancels.
template <typename math_t>
struct Gelu {
  static constexpr math_t kLinear = 1.5957691216057307, kCubic = 0.044715 * kLinear;

  // From 32 on s is 0 or 1 to the last bit of a double; further out u^3 would overflow.
  static math_t not_far_below(math_t u) { return u < -32 ? -32 : u; }
  static math_t not_far(math_t u) { return not_far_below(u > 32 ? 32 : u); }

  explicit Gelu(math_t argument)
      : u(argument),
        square(u * u),
        e(exponential(-std::abs(u * (kLinear + kCubic * square)))),
        larger(1 / (1 + e)),
        s(u < 0 ? e * larger : larger) {}

  math_t value() const { return u * s; }
  math_t derivative() const { return s + u * (kLinear + 3 * kCubic * square) * (e * larger) * larger; }

  const math_t u, square, e, larger, s;
};

// gelu(x + bias) of `n` neighbouring elements of a row.
template <typename math_t, typename value_t>
DGPO_FAST_MULTIVERSION void biased_gelu(const value_t* x, const value_t* bias, value_t* y, int64_t n) {
  using G = Gelu<math_t>;
  for (int64_t i = 0; i < n; ++i)
    y[i] = static_cast<value_t>(G(G::not_far_below(static_cast<math_t>(x[i]) + static_cast<math_t>(bias[i]))).value());
}

// The gradient of x for `n` neighbouring elements of a row, added to `sums` before it is rounded, unless that is null.
template <typename math_t, typename value_t>
DGPO_FAST_MULTIVERSION void biased_gelu_backward(const value_t* grad, const value_t* x, const value_t* bias,
                                                 value_t* grad_x, math_t* sums, int64_t n) {
  using G = Gelu<math_t>;
  const auto gradient = [&](int64_t i) {
    const math_t u = static_cast<math_t>(x[i]) + static_cast<math_t>(bias[i]);
    return static_cast<math_t>(grad[i]) * G(G::not_far(u)).derivative();
  };
  if (sums == nullptr) {
    for (int64_t i = 0; i < n; ++i) grad_x[i] = static_cast<value_t>(gradient(i));
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const math_t of_u = gradient(i);
    grad_x[i] = static_cast<value_t>(of_u);
    sums[i] += of_u;
  }
}

}  // namespace dgpo_fast::cpu
