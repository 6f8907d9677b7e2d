#pragma once

#include <cstdint>

#include "multiversion.h"

namespace dgpo_fast::cpu {

// What the step of one sample multiplies with, as in dgpo_fast/ops/sde_step.py.
template <typename math_t>
struct StepCoefficients {
  math_t of_x, of_velocity, std;
};

// The three loops of a step, over `n` elements that stay in the cache between them. The mean is rounded to memory
// before it is used, so that it has the same bits where x_next is drawn and where it is given.
template <typename math_t, typename velocity_t>
DGPO_FAST_MULTIVERSION void step_mean(const math_t* x, const velocity_t* velocity, const StepCoefficients<math_t> step,
                                      math_t* mean, int64_t n) {
  for (int64_t i = 0; i < n; ++i) mean[i] = step.of_x * x[i] + step.of_velocity * static_cast<math_t>(velocity[i]);
}

template <typename math_t, typename noise_t>
DGPO_FAST_MULTIVERSION void draw_step(const math_t* mean, const noise_t* noise, math_t std, math_t* x_next, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x_next[i] = mean[i] + std * static_cast<math_t>(noise[i]);
}

// In an order that n alone decides.
template <typename math_t>
DGPO_FAST_MULTIVERSION double sum_squared_distances(const math_t* one, const math_t* other, int64_t n) {
  constexpr int kLanes = 16;
  math_t lanes[kLanes] = {};
  const auto add = [&](int64_t i, int lane) { lanes[lane] += (one[i] - other[i]) * (one[i] - other[i]); };
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t first = 0; first < whole; first += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) add(first + lane, lane);
  for (int64_t i = whole; i < n; ++i) add(i, static_cast<int>(i - whole));
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// of_velocity (grad_mean + of_distance (x_next - mean)); `grad_mean` may be null.
template <typename math_t, typename velocity_t>
DGPO_FAST_MULTIVERSION void step_gradient(const math_t* grad_mean, math_t of_distance, const math_t* x,
                                          const velocity_t* velocity, const math_t* x_next,
                                          const StepCoefficients<math_t> step, velocity_t* grad_velocity, int64_t n) {
  const auto of_log_prob = [&](int64_t i) {
    const math_t mean = step.of_x * x[i] + step.of_velocity * static_cast<math_t>(velocity[i]);
    return of_distance * (x_next[i] - mean);
  };
  if (grad_mean == nullptr) {
    for (int64_t i = 0; i < n; ++i) grad_velocity[i] = static_cast<velocity_t>(step.of_velocity * of_log_prob(i));
    return;
  }
  for (int64_t i = 0; i < n; ++i)
    grad_velocity[i] = static_cast<velocity_t>(step.of_velocity * (grad_mean[i] + of_log_prob(i)));
}

}  // namespace dgpo_fast::cpu
