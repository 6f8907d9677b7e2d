// Advantages on the CPU. Schema, equation and reference: dgpo_fast/ops/group_advantages.py.

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "dispatch.h"

namespace dgpo_fast::cpu {
namespace {

struct Moments {
  double mean, std;
};

// Population moments of the valid ones of `n` rewards; equal rewards have a deviation of exactly 0 about themselves.
template <typename number_t>
Moments moments(const number_t* reward, const bool* valid, int64_t n) {
  double sum = 0, lowest = std::numeric_limits<double>::infinity(), highest = -lowest;
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!valid[i]) continue;
    const double value = static_cast<double>(reward[i]);
    sum += value, ++count;
    lowest = std::min(lowest, value), highest = std::max(highest, value);
  }
  if (count == 0 || (lowest == highest && std::isfinite(sum))) return {highest, 0.0};
  const double mean = sum / static_cast<double>(count);
  double squares = 0;
  for (int64_t i = 0; i < n; ++i)
    if (valid[i]) squares += (static_cast<double>(reward[i]) - mean) * (static_cast<double>(reward[i]) - mean);
  return {mean, std::sqrt(squares / static_cast<double>(count))};
}

std::tuple<Tensor, Tensor, Tensor> group_advantages(const Tensor& reward_B, const Tensor& valid_B, int64_t group_size,
                                                    bool global_std, double epsilon, double clamp) {
  check_argument(reward_B.dim() == 1, "reward_B", "expected [B]");
  check_argument(is_one_of(reward_B, {ScalarType::Float, ScalarType::Double}), "reward_B",
                 "expected float32 or float64, got ", dtype_name(reward_B));
  check_argument(is_one_of(valid_B, {ScalarType::Bool}), "valid_B", "expected bool, got ", dtype_name(valid_B));
  check_per_sample(valid_B, "valid_B", reward_B);
  const int64_t num_samples = reward_B.size(0);
  check_argument(group_size >= 1 && num_samples % group_size == 0, "group_size", "expected a divisor of ", num_samples,
                 ", the number of rewards, got ", group_size);
  check_argument(epsilon > 0, "epsilon", "expected a positive number, got ", epsilon);
  check_argument(clamp > 0, "clamp", "expected a positive number, got ", clamp);
  const Tensor rewards = dense(reward_B), truths = dense(valid_B);
  const Tensor advantage_B = torch::stable::empty_like(rewards), clamped_B = torch::stable::empty_like(truths);
  const Tensor std_G = empty(rewards, {num_samples / group_size});
  dispatch_number(rewards.scalar_type(), [&]<typename number_t>() {
    const number_t* reward = rewards.const_data_ptr<number_t>();
    const bool* valid = truths.const_data_ptr<bool>();
    number_t *advantage = advantage_B.mutable_data_ptr<number_t>(), *std = std_G.mutable_data_ptr<number_t>();
    bool* clamped = clamped_B.mutable_data_ptr<bool>();
    const double of_all = global_std ? moments(reward, valid, num_samples).std : 0.0;
    for (int64_t first = 0; first < num_samples; first += group_size) {
      const Moments of_group = moments(reward + first, valid + first, group_size);
      *std++ = static_cast<number_t>(of_group.std);
      const double spread = (global_std ? of_all : of_group.std) + epsilon;
      for (int64_t i = first; i < first + group_size; ++i) {
        const double raw = valid[i] ? (static_cast<double>(reward[i]) - of_group.mean) / spread : 0.0;
        const double within = std::isnan(raw) ? raw : std::clamp(raw, -clamp, clamp);
        advantage[i] = static_cast<number_t>(within);
        clamped[i] = within != raw;
      }
    }
  });
  return {advantage_B, std_G, clamped_B};
}

}  // namespace
}  // namespace dgpo_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(dgpo_fast, CPU, m) {
  m.impl("group_advantages", TORCH_BOX(&dgpo_fast::cpu::group_advantages));
}
