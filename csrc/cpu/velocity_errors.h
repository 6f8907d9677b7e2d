#pragma once

#include <cstdint>

#include "multiversion.h"

namespace dgpo_fast::cpu {

// The results, in the order of the schema in dgpo_fast/ops/velocity_errors.py.
enum VelocityError { kPolicy, kOld, kReference, kDistance, kNumErrors };

// Neighbouring elements of one sample. What is absent points to what stands in for it: `old` and `reference` to `policy`,
// `unconditional` to `reference`, which guides it to itself exactly.
template <typename velocity_t>
struct Velocities {
  const velocity_t *policy, *old, *reference, *unconditional;

  Velocities operator+(int64_t i) const { return {policy + i, old + i, reference + i, unconditional + i}; }
};

// Adds up the squares of `n` elements for each of the results, in an order that n alone decides.
template <typename math_t, typename velocity_t, typename noise_t>
DGPO_FAST_MULTIVERSION void sum_squares(const math_t* x0, const noise_t* noise, const Velocities<velocity_t> v,
                                        math_t guidance, int64_t n, double (&sums)[kNumErrors]) {
  constexpr int kLanes = 16;
  math_t lanes[kNumErrors][kLanes] = {};
  const auto add = [&](int64_t i, int lane) {
    const math_t target = static_cast<math_t>(noise[i]) - x0[i];
    const math_t policy = static_cast<math_t>(v.policy[i]), unconditional = static_cast<math_t>(v.unconditional[i]);
    const math_t guided = unconditional + guidance * (static_cast<math_t>(v.reference[i]) - unconditional);
    const math_t differences[kNumErrors] = {policy - target, static_cast<math_t>(v.old[i]) - target, guided - target,
                                            policy - guided};
    for (int row = 0; row < kNumErrors; ++row) lanes[row][lane] += differences[row] * differences[row];
  };
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t first = 0; first < whole; first += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) add(first + lane, lane);
  for (int64_t i = whole; i < n; ++i) add(i, static_cast<int>(i - whole));
  for (int row = 0; row < kNumErrors; ++row) {
    sums[row] = 0;
    for (int lane = 0; lane < kLanes; ++lane) sums[row] += lanes[row][lane];
  }
}

// of_target (v - v*) + of_reference (v - v_ref) of `n` elements of one sample.
template <typename math_t, typename velocity_t, typename noise_t>
DGPO_FAST_MULTIVERSION void velocity_gradient(const math_t* x0, const noise_t* noise, const Velocities<velocity_t> v,
                                              math_t guidance, math_t of_target, math_t of_reference,
                                              velocity_t* grad_velocity, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const math_t target = static_cast<math_t>(noise[i]) - x0[i];
    const math_t policy = static_cast<math_t>(v.policy[i]), unconditional = static_cast<math_t>(v.unconditional[i]);
    const math_t guided = unconditional + guidance * (static_cast<math_t>(v.reference[i]) - unconditional);
    grad_velocity[i] = static_cast<velocity_t>(of_target * (policy - target) + of_reference * (policy - guided));
  }
}

}  // namespace dgpo_fast::cpu
