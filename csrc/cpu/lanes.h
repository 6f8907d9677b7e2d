#pragma once

#include <cstdint>

namespace dgpo_fast::cpu {

// The sum of term(i), called once for each i in 0..n-1, in an order that n alone decides: lanes that fill several
// vector registers, so that one addition need not wait for the last, then a tree, whose few roundings keep the sum of a
// row within an ulp or two. Inlined always, so that it is compiled for the instruction set of its caller.
template <typename math_t, typename Term>
[[gnu::always_inline]] inline math_t sum_in_lanes(int64_t n, const Term& term) {
  constexpr int kLanes = 64;
  math_t lanes[kLanes] = {};
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t first = 0; first < whole; first += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += term(first + lane);
  for (int64_t i = whole; i < n; ++i) lanes[i - whole] += term(i);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

}  // namespace dgpo_fast::cpu
