#pragma once

namespace dgpo_fast::cuda {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// The sum over the lanes of a warp, in the order of a butterfly: the same in every lane, and on every run.
template <typename number_t>
__device__ __forceinline__ number_t sum_over_warp(number_t value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kWholeWarp, value, distance);
  return value;
}

}  // namespace dgpo_fast::cuda
