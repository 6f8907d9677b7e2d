// The exponential for vectorised loops against std::exp in double, over all of float.

#include "exponential.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>

namespace {

using dgpo_fast::exponential;
using Limits = std::numeric_limits<float>;

// The distance from `result` to the next float.
double ulp(float result) {
  const float next = std::nextafter(result, Limits::infinity());
  return static_cast<double>(std::isinf(next) ? result - std::nextafter(result, 0.0f) : next - result);
}

bool is_exact(float x) {
  const double expected = std::exp(static_cast<double>(x));
  const float result = exponential(x);
  if (std::isnan(x)) return std::isnan(result);
  // What lies beyond the largest float by half a step or more is infinite.
  if (static_cast<float>(expected) == Limits::infinity()) return result >= Limits::max();
  return std::abs(result - expected) <= ulp(static_cast<float>(expected));
}

}  // namespace

int main() {
  int failures = 0;
  const auto check = [&](float x) {
    if (is_exact(x)) return;
    if (++failures <= 10) std::printf("exp(%a) = %a, expected %a\n", x, exponential(x), std::exp(double{x}));
  };
  // A prime step through the bit patterns meets every exponent, either sign and NaN.
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 499)
    check(std::bit_cast<float>(static_cast<uint32_t>(bits)));
  // Most floats are too small or too large to say much: the range between, evenly.
  for (double x = -104.5; x < 89.5; x += 1.0 / 65536) check(static_cast<float>(x));

  const bool ends = exponential(0.0f) == 1 && exponential(-0.0f) == 1 && exponential(-Limits::infinity()) == 0 &&
                    exponential(Limits::infinity()) == Limits::infinity() && exponential(-200.0f) == 0 &&
                    exponential(89.0f) == Limits::infinity() && std::isnan(exponential(Limits::quiet_NaN()));
  if (!ends) std::printf("exp of 0, of the infinities or of NaN is wrong\n");
  return failures > 0 || !ends;
}
