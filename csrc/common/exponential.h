#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace dgpo_fast {

inline double exponential(double x) { return std::exp(x); }

// e^x to 1 ulp, written so that a loop of it becomes vector instructions, which a loop of calls to libm does not:
// x = k ln 2 + r with an integer k and |r| <= ln 2 / 2, so that e^x = 2^k e^r. NaN stays NaN.
inline float exponential(float x) {
  // From here on the result is 0 or infinite in float; k stays within 150 of 0.
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  // At 3 * 2^22 the last bit of a float counts ones, so that the sum is rounded to an integer, which its bits hold.
  constexpr float kShift = 0x1.8p23f;
  const float shifted = x * 0x1.715476p0f + kShift;
  const float k = shifted - kShift;
  const int32_t exponent = static_cast<int32_t>(std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(kShift));
  // ln 2 in two parts, the first short enough for its product with k to be exact; what r loses, the sum below has.
  const float coarse = x - k * 0x1.62e4p-1f, rest = k * 0x1.7f7d1cp-20f;
  const float r = coarse - rest;
  // The Taylor series; its next term is below 2^-27.
  float series = 1.0f / 5040;
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  const float power = 1.0f + (coarse + (r * r * series - rest));
  // 2^k in two factors: one float would not hold those of subnormal results and of the largest ones.
  const auto two_to = [](int32_t n) { return std::bit_cast<float>(static_cast<uint32_t>(n + 127) << 23); };
  const int32_t half = exponent >> 1;
  return power * two_to(half) * two_to(exponent - half);
}

}  // namespace dgpo_fast
