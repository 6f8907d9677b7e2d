#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "groups.h"

namespace dgpo_fast::cpu {

// s_G of every group, summed in the order of its samples.
template <typename number_t>
std::vector<double> scores_of(const Groups<number_t>& at, double beta) {
  std::vector<double> scores(at.num_groups, 0.0);
  for (int64_t m = 0; m < at.num_samples; ++m)
    scores[at.group[m]] += static_cast<double>(at.advantage[m]) *
                           (static_cast<double>(at.error[m]) - static_cast<double>(at.reference_error[m]));
  for (int64_t g = 0; g < at.num_groups; ++g) scores[g] *= beta / static_cast<double>(at.size[g]);
  return scores;
}

// The comparison is made in number_t, as the ratio is exactly 1 there for equal errors.
template <typename number_t>
bool is_clipped(number_t error, number_t old_error, number_t advantage, double clip) {
  const number_t ratio = std::exp(old_error - error);
  return advantage > 0 ? ratio > static_cast<number_t>(1 + clip) : ratio < static_cast<number_t>(1 - clip);
}

}  // namespace dgpo_fast::cpu
