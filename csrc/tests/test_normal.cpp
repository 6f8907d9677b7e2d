// Box and Muller's transform in float against the same in double, to 4 ulp: many words, and every word where a branch
// changes.

#include "normal.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <vector>

#include "philox.h"

namespace {

constexpr double kPi = 3.14159265358979323846;
constexpr double kBound = 4;

struct Pair {
  double first, second;
};

// The angle is brought near zero in integers: the double nearest to 2 pi b / 2^32 has lost digits of its sine near pi.
Pair exact(uint32_t a, uint32_t b) {
  const double radius = std::sqrt(-2 * std::log((a + 0.5) / 4294967296.0));
  const int64_t quarter = (static_cast<int64_t>(b) + (1 << 29)) >> 30;
  const double x = static_cast<double>(static_cast<int64_t>(b) - (quarter << 30)) * (kPi / 2147483648.0);
  const double cosine = radius * std::cos(x), sine = radius * std::sin(x);
  switch (quarter % 4) {
    case 0: return {cosine, sine};
    case 1: return {-sine, cosine};
    case 2: return {-cosine, -sine};
    default: return {sine, -cosine};
  }
}

double error_in_ulp(float number, double exact) {
  const float size = std::abs(static_cast<float>(exact));
  const double ulp = std::nextafter(size, std::numeric_limits<float>::infinity()) - size;
  const double error = std::abs(number - exact) / ulp;
  return std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
}

double error_in_ulp(uint32_t a, uint32_t b) {
  const auto [first, second] = dgpo_fast::box_muller(a, b);
  const Pair truth = exact(a, b);
  return std::max(error_in_ulp(first, truth.first), error_in_ulp(second, truth.second));
}

// `centres` and their neighbours, modulo 2^32.
std::vector<uint32_t> around(const std::vector<uint32_t>& centres) {
  std::vector<uint32_t> words;
  for (uint32_t centre : centres)
    for (int distance = -3; distance <= 3; ++distance) words.push_back(centre + static_cast<uint32_t>(distance));
  return words;
}

// Where the logarithm changes its branch or its exponent, or float32 its spacing.
std::vector<uint32_t> radius_edges() {
  std::vector<uint32_t> centres{0, 0x99999999};
  for (int bit = 0; bit < 32; ++bit) {
    centres.push_back(uint32_t{1} << bit);
    centres.push_back(static_cast<uint32_t>(std::sqrt(0.5) * std::exp2(bit + 1)));
  }
  return around(centres);
}

std::vector<uint32_t> angle_edges() {
  std::vector<uint32_t> centres;
  for (uint32_t octant = 0; octant < 8; ++octant) centres.push_back(octant << 29);
  return around(centres);
}

class Worst {
 public:
  explicit Worst(const char* what) : what_(what) {}

  void look_at(uint32_t a, uint32_t b) {
    const double error = error_in_ulp(a, b);
    if (error > error_) error_ = error, a_ = a, b_ = b;
  }

  int failures() const {
    std::printf("%s: %.2f ulp at a = 0x%08x, b = 0x%08x\n", what_, error_, a_, b_);
    return error_ > kBound;
  }

 private:
  const char* what_;
  double error_ = -1;
  uint32_t a_ = 0, b_ = 0;
};

int failures_at_edges() {
  Worst worst("edges");
  const std::vector<uint32_t> angles = angle_edges();
  for (uint32_t a : radius_edges())
    for (uint32_t b : angles) worst.look_at(a, b);
  return worst.failures();
}

int failures_of_many_words() {
  Worst worst("many words");
  for (uint64_t i = 0; i < 2'000'000; ++i) {
    const dgpo_fast::Words block = dgpo_fast::philox_block({1, 2, 3, 4}, i);
    worst.look_at(block.w0, block.w1);
    worst.look_at(block.w2, block.w3);
  }
  return worst.failures();
}

}  // namespace

int main() { return failures_at_edges() + failures_of_many_words(); }
