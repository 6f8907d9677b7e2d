#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace dgpo_fast {

struct NormalPair {
  float first, second;
};

namespace detail {

DGPO_FAST_HOST_DEVICE float bits_to_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

DGPO_FAST_HOST_DEVICE uint32_t float_to_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

// log((word + 1/2) / 2^32), a number in [-22.9, -1.1e-10], as e ln 2 + log(1 + f) with f in (-0.4, 0.42).
DGPO_FAST_HOST_DEVICE float log_uniform(uint32_t word) {
  // Near 1 the uniform number would lose its digits in float32; its distance to 1 does not.
  const bool near_one = word > 0x99999999u;  // 0.6
  const float distance = (static_cast<float>(~word) + 0.5f) * 0x1p-32f;
  const float scaled = static_cast<float>(word) + 0.5f;
  // Shifts the mantissa's range from [1, 2) to [sqrt(1/2), sqrt(2)).
  const uint32_t shifted = float_to_bits(scaled) + (0x3F800000u - 0x3F3504F3u);
  const float mantissa = bits_to_float((shifted & 0x007FFFFFu) + 0x3F3504F3u);
  const float e = near_one ? 0.0f : static_cast<float>(static_cast<int32_t>(shifted >> 23) - 127 - 32);
  const float f = near_one ? -distance : mantissa - 1.0f;
  // log(1 + f) = 2 atanh(s), s = f / (2 + f), |s| <= 1/4: the next term of the series is below 2^-27 of the first. Its
  // leading terms are f - f^2 / 2, where f is exact.
  const float s = f / (2.0f + f), z = s * s;
  float series = 1.0f / 11;
  series = series * z + 1.0f / 9;
  series = series * z + 1.0f / 7;
  series = series * z + 1.0f / 5;
  series = series * z + 1.0f / 3;
  const float half_square = 0.5f * f * f;
  const float rest = s * (half_square + 2.0f * z * series);
  // ln 2 in two parts, the first short enough for its product with e to be exact.
  return e * 0x1.62e4p-1f + (f - (half_square - (rest + e * 0x1.7f7d1cp-20f)));
}

}  // namespace detail

// Two standard normal numbers from two words, as rng.py's Box-Muller transform has them in float64, to 4 ulp:
//
//   radius = sqrt(-2 log((a + 1/2) / 2^32)), angle = 2 pi b / 2^32:   radius cos(angle), radius sin(angle)
//
// The angle is reduced to an octant in integers, exactly. There sin and cos are their Taylor series, of which the next
// terms are below 2^-28.
DGPO_FAST_HOST_DEVICE NormalPair box_muller(uint32_t a, uint32_t b) {
  const float radius = sqrtf(-2.0f * detail::log_uniform(a));
  const uint32_t quadrant = (b + 0x20000000u) >> 30;  // the nearest; 4 is 0
  // The offset has more digits than a float, and so has pi: what x lacks of both is added at the end.
  const int32_t offset = static_cast<int32_t>(b - (quadrant << 30));
  const float rounded = static_cast<float>(offset);
  const float lost = static_cast<float>(offset - static_cast<int32_t>(rounded));
  const float x = rounded * 0x1.921fb6p-30f;
  const float x_lost = lost * 0x1.921fb6p-30f - rounded * 0x1.777a5cp-55f;
  const float z = x * x;
  float sine = 1.0f / 362880;
  sine = sine * z - 1.0f / 5040;
  sine = sine * z + 1.0f / 120;
  sine = sine * z - 1.0f / 6;
  sine = x + (x * z * sine + x_lost);
  float cosine = -1.0f / 3628800;
  cosine = cosine * z + 1.0f / 40320;
  cosine = cosine * z - 1.0f / 720;
  cosine = cosine * z + 1.0f / 24;
  cosine = cosine * z - 0.5f;
  cosine = 1.0f + (z * cosine - x * x_lost);
  const bool swapped = quadrant & 1;
  const float first = radius * (swapped ? sine : cosine), second = radius * (swapped ? cosine : sine);
  // Quadrants 1 and 2 have a negative cosine, 2 and 3 a negative sine. The sign comes last: a product would be fused
  // into the caller's next sum, where noise that was given is not.
  return {((quadrant + 1) & 2) ? -first : first, (quadrant & 2) ? -second : second};
}

}  // namespace dgpo_fast
