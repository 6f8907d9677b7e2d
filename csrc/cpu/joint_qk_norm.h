#pragma once

#include <cmath>
#include <cstdint>

#include "multiversion.h"

namespace dgpo_fast::cpu {

// The sums of what `term(i, terms)` gives for `size` elements, in lanes that fill vector registers: an order that
// `size` alone decides.
template <typename math_t, int kSums, typename Term>
inline void sum_in_lanes(int64_t size, const Term& term, math_t (&sums)[kSums]) {
  constexpr int kLanes = 16;
  math_t lanes[kSums][kLanes] = {};
  const auto add = [&](int64_t i, int lane) {
    math_t terms[kSums];
    term(i, terms);
    for (int sum = 0; sum < kSums; ++sum) lanes[sum][lane] += terms[sum];
  };
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t first = 0; first < whole; first += kLanes) {
    // GCC would unroll the lanes before it vectorises them: 0.32 ns an element instead of 0.22 (float32, 2026-11).
#pragma GCC unroll 1
    for (int lane = 0; lane < kLanes; ++lane) add(first + lane, lane);
  }
  for (int64_t i = whole; i < size; ++i) add(i, static_cast<int>(i - whole));
  for (int sum = 0; sum < kSums; ++sum) {
    sums[sum] = 0;
    for (int lane = 0; lane < kLanes; ++lane) sums[sum] += lanes[sum][lane];
  }
}

// rms(x) = x / sqrt(mean(x^2) + eps) * weight of each head of one token: `num_heads` times `size` elements.
template <typename math_t, typename value_t>
DGPO_FAST_MULTIVERSION void normalise_heads(const value_t* x, const value_t* weight, math_t eps, int64_t num_heads,
                                            int64_t size, value_t* y) {
  for (int64_t head = 0; head < num_heads; ++head, x += size, y += size) {
    math_t squares[1];
    sum_in_lanes(size, [&](int64_t i, math_t* terms) {
      const math_t of_x = static_cast<math_t>(x[i]);
      terms[0] = of_x * of_x;
    }, squares);
    const math_t scale = 1 / std::sqrt(squares[0] / size + eps);
    for (int64_t i = 0; i < size; ++i)
      y[i] = static_cast<value_t>(static_cast<math_t>(x[i]) * scale * static_cast<math_t>(weight[i]));
  }
}

// The gradient of x for each head of one token: with n = x s, s = 1 / sqrt(mean(x^2) + eps), it is
//
//   s (grad weight - n mean(grad weight n)),
//
// and grad n is added to `weight_sums`, `size` elements, unless that is null.
template <typename math_t, typename value_t>
DGPO_FAST_MULTIVERSION void normalise_heads_backward(const value_t* grad_y, const value_t* x, const value_t* weight,
                                                     math_t eps, int64_t num_heads, int64_t size, value_t* grad_x,
                                                     math_t* weight_sums) {
  for (int64_t head = 0; head < num_heads; ++head, grad_y += size, x += size, grad_x += size) {
    math_t sums[2];  // of x^2 and of grad weight x
    sum_in_lanes(size, [&](int64_t i, math_t* terms) {
      const math_t of_x = static_cast<math_t>(x[i]);
      terms[0] = of_x * of_x;
      terms[1] = static_cast<math_t>(grad_y[i]) * static_cast<math_t>(weight[i]) * of_x;
    }, sums);
    const math_t scale = 1 / std::sqrt(sums[0] / size + eps);
    const math_t along = sums[1] / size * scale * scale;
    for (int64_t i = 0; i < size; ++i) {
      const math_t of_n = static_cast<math_t>(grad_y[i]) * static_cast<math_t>(weight[i]);
      grad_x[i] = static_cast<value_t>(scale * (of_n - static_cast<math_t>(x[i]) * along));
    }
    if (weight_sums == nullptr) continue;
    for (int64_t i = 0; i < size; ++i)
      weight_sums[i] += static_cast<math_t>(grad_y[i]) * (static_cast<math_t>(x[i]) * scale);
  }
}

}  // namespace dgpo_fast::cpu
