#pragma once

#include <cstdint>

#include "multiversion.h"

namespace dgpo_fast::cpu {

constexpr int64_t kMaxStates = 4;

// Advances `n` elements of one sample:
//
//   new_state[k][i] = sum_j coefficients[k][j] * inputs[j][i],   inputs = [state_0 .. state_{K-1}; v_cond; v_uncond]
//
// `coefficients` is row-major [K, K + 2]; without guidance its last column and `v_uncond` are not read. Element i of
// every input is read before element i of any output is written, so `new_state` may be `state` itself: hence no
// __restrict__, and the promise to the vectoriser that no other overlap exists.
template <int K, bool kGuided, typename state_t, typename velocity_t>
DGPO_FAST_MULTIVERSION void advance(const state_t* coefficients, const state_t* const (&state)[kMaxStates],
                                    const velocity_t* v_cond, const velocity_t* v_uncond,
                                    state_t* const (&new_state)[kMaxStates], int64_t n) {
  constexpr int kInputs = K + 1 + kGuided;
  state_t c[K][kInputs];
  for (int k = 0; k < K; ++k)
    for (int j = 0; j < kInputs; ++j) c[k][j] = coefficients[k * (K + 2) + j];

#if defined(__clang__)
#pragma clang loop vectorize(assume_safety)
#elif defined(__GNUC__)
#pragma GCC ivdep
#endif
  for (int64_t i = 0; i < n; ++i) {
    state_t x[kInputs];
    for (int j = 0; j < K; ++j) x[j] = state[j][i];
    x[K] = static_cast<state_t>(v_cond[i]);
    if constexpr (kGuided) x[K + 1] = static_cast<state_t>(v_uncond[i]);
    for (int k = 0; k < K; ++k) {
      state_t sum = c[k][0] * x[0];
      for (int j = 1; j < kInputs; ++j) sum += c[k][j] * x[j];
      new_state[k][i] = sum;
    }
  }
}

}  // namespace dgpo_fast::cpu
