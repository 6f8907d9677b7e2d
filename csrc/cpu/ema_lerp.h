#pragma once

#include <cstdint>

#include "multiversion.h"

namespace dgpo_fast::cpu {

// average + weight (value - average) for `n` elements, from the nearer end, as torch.lerp has it: the value itself at
// weight 1, the average itself at 0.
template <typename average_t, typename value_t>
DGPO_FAST_MULTIVERSION void lerp(average_t* average, const value_t* value, average_t weight, int64_t n) {
  if (weight < average_t{0.5}) {
    for (int64_t i = 0; i < n; ++i) average[i] += weight * (static_cast<average_t>(value[i]) - average[i]);
    return;
  }
  const average_t rest = weight - 1;
  for (int64_t i = 0; i < n; ++i) {
    const average_t end = static_cast<average_t>(value[i]);
    average[i] = end + rest * (end - average[i]);
  }
}

}  // namespace dgpo_fast::cpu
