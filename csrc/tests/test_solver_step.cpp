// The inner loop of the solver step against the sum written out in double, without torch.

#include "solver_step.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

namespace {

using dgpo_fast::cpu::advance;
using dgpo_fast::cpu::kMaxStates;

// One sample of K states and two velocities: numbers of either sign, without a pattern that a shifted index would keep.
template <int K, typename state_t, typename velocity_t>
struct Sample {
  explicit Sample(int64_t n) : size(n), v_cond(n), v_uncond(n) {
    for (int64_t i = 0; i < n; ++i) {
      for (int k = 0; k < K; ++k) states[k].push_back(static_cast<state_t>(std::sin(1.7 * i + k)));
      v_cond[i] = static_cast<velocity_t>(std::cos(2.3 * i));
      v_uncond[i] = static_cast<velocity_t>(std::cos(3.1 * i + 1));
    }
    for (int c = 0; c < K * (K + 2); ++c) coefficients.push_back(static_cast<state_t>(std::sin(0.9 * c + 0.2)));
  }

  double expected(int k, int64_t i, bool guided) const {
    const state_t* row = &coefficients[k * (K + 2)];
    double sum = static_cast<double>(row[K]) * v_cond[i];
    if (guided) sum += static_cast<double>(row[K + 1]) * v_uncond[i];
    for (int j = 0; j < K; ++j) sum += static_cast<double>(row[j]) * states[j][i];
    return sum;
  }

  int64_t size;
  std::array<std::vector<state_t>, K> states;
  std::vector<velocity_t> v_cond, v_uncond;
  std::vector<state_t> coefficients;
};

// The largest error in units of the rounding bound: K + 2 products of numbers below 1, each rounded, summed with
// rounding.
template <int K, bool kGuided, typename state_t, typename velocity_t>
double error_in_bounds(int64_t n, bool in_place) {
  const Sample<K, state_t, velocity_t> before(n);
  Sample<K, state_t, velocity_t> after = before;
  std::array<std::vector<state_t>, K> fresh;
  const state_t* state[kMaxStates] = {};
  state_t* new_state[kMaxStates] = {};
  for (int k = 0; k < K; ++k) {
    fresh[k].assign(n, std::numeric_limits<state_t>::quiet_NaN());
    state[k] = after.states[k].data();
    new_state[k] = in_place ? after.states[k].data() : fresh[k].data();
  }
  advance<K, kGuided>(before.coefficients.data(), state, before.v_cond.data(),
                      kGuided ? before.v_uncond.data() : nullptr, new_state, n);

  const double bound = (K + 2) * (K + 2) * static_cast<double>(std::numeric_limits<state_t>::epsilon());
  double worst = 0;
  for (int k = 0; k < K; ++k)
    for (int64_t i = 0; i < n; ++i) {
      const double error = std::abs(new_state[k][i] - before.expected(k, i, kGuided)) / bound;
      worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : std::max(worst, error);
    }
  return worst;
}

template <int K, bool kGuided, typename state_t, typename velocity_t>
int failures() {
  int count = 0;
  for (int64_t n : {0, 1, 3, 16, 63, 1000})
    for (bool in_place : {false, true}) {
      const double error = error_in_bounds<K, kGuided, state_t, velocity_t>(n, in_place);
      if (error <= 1) continue;
      std::printf("K=%d guided=%d n=%lld in_place=%d: %g times the rounding bound\n", K, kGuided,
                  static_cast<long long>(n), in_place, error);
      ++count;
    }
  return count;
}

template <int K>
int failures_of_k() {
  return failures<K, true, float, float>() + failures<K, false, float, float>() +
         failures<K, true, float, double>() + failures<K, true, double, float>() +
         failures<K, false, double, double>();
}

}  // namespace

int main() { return failures_of_k<1>() + failures_of_k<2>() + failures_of_k<3>() + failures_of_k<4>(); }
