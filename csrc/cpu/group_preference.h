#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace dgpo_fast::cpu {

// The samples of a micro-batch and their groups.
template <typename number_t>
struct Groups {
  const number_t *error, *reference_error, *advantage;
  const int64_t* group;
  const number_t* size;
  int64_t num_samples, num_groups;
};

template <typename number_t>
std::vector<double> scores_of(const Groups<number_t>& at, double beta) {
  std::vector<double> scores(at.num_groups, 0.0);
  for (int64_t m = 0; m < at.num_samples; ++m)
    scores[at.group[m]] += static_cast<double>(at.advantage[m]) *
                           (static_cast<double>(at.error[m]) - static_cast<double>(at.reference_error[m]));
  for (int64_t g = 0; g < at.num_groups; ++g) scores[g] *= beta / static_cast<double>(at.size[g]);
  return scores;
}

inline double softplus(double s) { return std::max(s, 0.0) + std::log1p(std::exp(-std::abs(s))); }

inline double sigmoid(double s) {
  const double z = std::exp(-std::abs(s));
  return (s >= 0 ? 1.0 : z) / (1.0 + z);
}

// The comparison is made in number_t, as the ratio is exactly 1 there for equal errors.
template <typename number_t>
bool is_clipped(number_t error, number_t old_error, number_t advantage, double clip) {
  const number_t ratio = std::exp(old_error - error);
  return advantage > 0 ? ratio > static_cast<number_t>(1 + clip) : ratio < static_cast<number_t>(1 - clip);
}

}  // namespace dgpo_fast::cpu
