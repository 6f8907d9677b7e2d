// Exponential moving averages on the CPU. Schema, equation and reference: dgpo_fast/ops/ema_lerp.py.

#include "ema_lerp.h"

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "contiguous_copies.h"
#include "parallel.h"

namespace dgpo_fast::cpu {
namespace {

using Tensors = std::vector<Tensor>;

bool have_equal_shapes(const Tensor& one, const Tensor& other) {
  const auto sizes = one.sizes(), others = other.sizes();
  return std::equal(sizes.begin(), sizes.end(), others.begin(), others.end());
}

void check_lists(const Tensors& averages, const Tensors& values, double decay) {
  check_argument(averages.size() == values.size(), "values", "expected ", averages.size(),
                 " tensors, one for each average, got ", values.size());
  check_argument(0 <= decay && decay <= 1, "decay", "expected a number in 0..1, got ", decay);
  if (averages.empty()) return;
  check_argument(is_one_of(averages[0], {ScalarType::Float, ScalarType::Double}), "averages",
                 "expected float32 or float64, got ", dtype_name(averages[0]));
  check_floating(values[0], "values");
}

void check_pair(const Tensors& averages, const Tensors& values, size_t i, ScalarType average_dtype,
                ScalarType value_dtype) {
  const Tensor &average = averages[i], &value = values[i];
  check_argument(average.scalar_type() == average_dtype, "averages", "expected the dtype of averages[0], ",
                 torch::headeronly::toString(average_dtype), ", got ", dtype_name(average));
  check_argument(value.scalar_type() == value_dtype, "values", "expected the dtype of values[0], ",
                 torch::headeronly::toString(value_dtype), ", got ", dtype_name(value));
  check_argument(average.is_cpu(), "averages", "expected the device of averages[0], cpu");
  check_argument(value.is_cpu(), "values", "expected the device of averages[0], cpu");
  check_argument(have_equal_shapes(average, value), "values", "expected the shape of averages[", i, "]");
  if (!average.is_contiguous()) check_own_memory(average, "averages");
}

// One average and its value in memory, and where the average ends among the elements of all, counted end to end.
struct Pair {
  void* average;
  const void* value;
  int64_t end;
};

// Cut into equal pieces for the threads: the sizes may differ a thousandfold.
template <typename average_t, typename value_t>
void advance(const std::vector<Pair>& pairs, average_t weight) {
  torch::stable::parallel_for(0, pairs.back().end, kGrainSize, [&](int64_t begin, int64_t last) {
    const auto ends_after = [](int64_t i, const Pair& pair) { return i < pair.end; };
    auto pair = std::upper_bound(pairs.begin(), pairs.end(), begin, ends_after);
    for (int64_t start = pair == pairs.begin() ? 0 : (pair - 1)->end; begin < last; start = pair++->end) {
      const int64_t i = begin - start, n = std::min(pair->end, last) - begin;
      lerp(static_cast<average_t*>(pair->average) + i, static_cast<const value_t*>(pair->value) + i, weight, n);
      begin += n;
    }
  });
}

// With hundreds of small tensors the time goes into asking torch about them, so nothing is asked twice.
void ema_lerp_(const Tensors& averages, const Tensors& values, double decay) {
  check_lists(averages, values, decay);
  if (averages.empty()) return;
  const ScalarType average_dtype = averages[0].scalar_type(), value_dtype = values[0].scalar_type();
  for (size_t i = 0; i < averages.size(); ++i) check_pair(averages, values, i, average_dtype, value_dtype);
  ContiguousCopies average_copies, value_copies;
  std::vector<Pair> pairs;
  pairs.reserve(averages.size());
  int64_t end = 0;
  for (size_t i = 0; i < averages.size(); ++i)
    pairs.push_back({average_copies.memory_of(averages[i]), value_copies.memory_of(values[i]),
                     end += averages[i].numel()});
  dispatch_floating(value_dtype, [&]<typename value_t>() {
    if (average_dtype == ScalarType::Double)
      advance<double, value_t>(pairs, 1 - decay);
    else
      advance<float, value_t>(pairs, static_cast<float>(1 - decay));
  });
  average_copies.write_back();
}

}  // namespace
}  // namespace dgpo_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(dgpo_fast, CPU, m) { m.impl("ema_lerp_", TORCH_BOX(&dgpo_fast::cpu::ema_lerp_)); }
