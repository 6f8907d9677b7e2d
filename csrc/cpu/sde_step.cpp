// One SDE step on the CPU. Schema, equations and reference: dgpo_fast/ops/sde_step.py.

#include "sde_step.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "noise.h"

namespace dgpo_fast::cpu {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr double kHalfLogTwoPi = 0.91893853320467274178;

void check_like(const Tensor& tensor, const char* name, const Tensor& x) {
  check_argument(tensor.scalar_type() == x.scalar_type(), name, "expected the dtype of x, ", dtype_name(x), ", got ",
                 dtype_name(tensor));
  check_argument(tensor.dim() == x.dim() && tensor.size(0) == x.size(0) && has_samples_like(tensor, x), name,
                 "expected the shape of x");
  check_argument(tensor.is_cpu(), name, "expected the device of x, cpu");
}

// Also returns the coefficients, one row after the other.
std::vector<double> check_step(const Tensor& x, const Tensor& velocity, const Tensor& coefficients_B3) {
  check_argument(x.dim() >= 1, "x", "expected [B, ...], got a scalar");
  check_argument(is_one_of(x, {ScalarType::Float, ScalarType::Double}), "x", "expected float32 or float64, got ",
                 dtype_name(x));
  check_argument(x.is_cpu(), "x", "expected the device of velocity, cpu");
  check_floating(velocity, "velocity");
  check_argument(velocity.dim() == x.dim() && velocity.size(0) == x.size(0) && has_samples_like(velocity, x),
                 "velocity", "expected the shape of x");
  check_argument(velocity.is_cpu(), "velocity", "expected the device of x, cpu");
  check_argument(is_one_of(coefficients_B3, {ScalarType::Float, ScalarType::Double}), "coefficients_B3",
                 "expected float32 or float64, got ", dtype_name(coefficients_B3));
  check_argument(coefficients_B3.dim() == 2 && coefficients_B3.size(0) == x.size(0) && coefficients_B3.size(1) == 3,
                 "coefficients_B3", "expected [", x.size(0), ", 3], three numbers for each sample");
  check_argument(coefficients_B3.is_cpu(), "coefficients_B3", "expected the device of x, cpu");
  std::vector<double> numbers = numbers_of(coefficients_B3);
  for (size_t i = 2; i < numbers.size(); i += 3)
    check_argument(numbers[i] >= 0, "coefficients_B3", "expected standard deviations that are not negative, got ",
                   numbers[i]);
  return numbers;
}

void check_source(const Tensor& x, const OptionalTensor& noise, const OptionalTensor& streams,
                  const OptionalTensor& group_B, const OptionalTensor& x_next) {
  check_argument(noise.has_value() + streams.has_value() + x_next.has_value() == 1, "noise",
                 "expected one of noise, streams and x_next");
  check_argument(group_B.has_value() != x_next.has_value(), "group_B",
                 "expected where noise is given or drawn, and only there");
  if (x_next)
    check_like(*x_next, "x_next", x);
  else
    check_noise(x, noise, streams, *group_B, "group_B");
}

template <typename math_t>
StepCoefficients<math_t> step_of(const std::vector<double>& coefficients, int64_t b) {
  const double* row = &coefficients[3 * b];
  return {static_cast<math_t>(row[0]), static_cast<math_t>(row[1]), static_cast<math_t>(row[2])};
}

// Calls `body.operator()<math_t, velocity_t>()`: the arithmetic has the dtype of x.
template <typename Body>
void dispatch(const Tensor& x, const Tensor& velocity, const Body& body) {
  dispatch_floating(velocity.scalar_type(), [&]<typename velocity_t>() {
    if (x.scalar_type() == ScalarType::Double)
      body.template operator()<double, velocity_t>();
    else
      body.template operator()<float, velocity_t>();
  });
}

// Calls body(b, first, n) for the pieces of every sample that GroupNoise would make.
template <typename Body>
void for_each_chunk(int64_t num_samples, int64_t sample_numel, const Body& body) {
  const int64_t chunks = GroupNoise::num_chunks(sample_numel);
  constexpr int64_t kGrain = kGrainSize / GroupNoise::kChunk;
  torch::stable::parallel_for(0, num_samples * chunks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % chunks * GroupNoise::kChunk;
      body(task / chunks, first, std::min(GroupNoise::kChunk, sample_numel - first));
    }
  });
}

// The mean over a sample's elements, from the sums over its chunks.
double log_prob(const double* sums, int64_t chunks, int64_t sample_numel, double std) {
  if (std == 0) return 0;
  double sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += sums[chunk];
  return -sum / static_cast<double>(sample_numel) / (2 * std * std) - std::log(std) - kHalfLogTwoPi;
}

std::tuple<Tensor, Tensor, Tensor> sde_step(const Tensor& x, const Tensor& velocity, const Tensor& coefficients_B3,
                                            const OptionalTensor& noise, const OptionalTensor& streams,
                                            const OptionalTensor& group_B, const OptionalTensor& x_next,
                                            bool with_mean) {
  const std::vector<double> coefficients = check_step(x, velocity, coefficients_B3);
  check_source(x, noise, streams, group_B, x_next);
  const Tensor samples = dense(x), velocities = torch::stable::contiguous(velocity);
  const Tensor given = dense(x_next.value_or(samples));
  const Tensor drawn = x_next ? empty(samples, {0}) : torch::stable::empty_like(samples);
  const Tensor mean = with_mean ? torch::stable::empty_like(samples) : empty(samples, {0});
  const Tensor log_prob_B = empty(samples, {x.size(0)});
  const int64_t num_samples = x.size(0), numel = num_samples > 0 ? x.numel() / num_samples : 0;
  dispatch(samples, velocities, [&]<typename math_t, typename velocity_t>() {
    const math_t* x_first = samples.const_data_ptr<math_t>();
    const velocity_t* velocity_first = velocities.const_data_ptr<velocity_t>();
    const math_t* given_first = given.const_data_ptr<math_t>();
    math_t* drawn_first = drawn.mutable_data_ptr<math_t>();
    math_t* mean_first = mean.mutable_data_ptr<math_t>();
    const int64_t chunks = GroupNoise::num_chunks(numel);
    std::vector<double> sums(num_samples * chunks);
    // `finish(mean, at)` returns the elements of x_next from `at` on.
    const auto advance = [&](int64_t b, int64_t first, int64_t n, const auto& finish) {
      const int64_t at = b * numel + first;
      math_t chunk[GroupNoise::kChunk];
      math_t* mean_at = with_mean ? mean_first + at : chunk;
      step_mean(x_first + at, velocity_first + at, step_of<math_t>(coefficients, b), mean_at, n);
      sums[b * chunks + first / GroupNoise::kChunk] = sum_squared_distances(finish(mean_at, at), mean_at, n);
    };
    if (x_next) {
      for_each_chunk(num_samples, numel, [&](int64_t b, int64_t first, int64_t n) {
        advance(b, first, n, [&](const math_t*, int64_t at) { return given_first + at; });
      });
    } else {
      const GroupNoise group_noise(noise, streams, *group_B);
      group_noise.for_each_piece<math_t>(numel, [&](int64_t b, int64_t first, int64_t n, const auto* z) {
        advance(b, first, n, [&](const math_t* mean_at, int64_t at) {
          draw_step(mean_at, z, step_of<math_t>(coefficients, b).std, drawn_first + at, n);
          return drawn_first + at;
        });
      });
    }
    math_t* out = log_prob_B.mutable_data_ptr<math_t>();
    for (int64_t b = 0; b < num_samples; ++b)
      out[b] = static_cast<math_t>(log_prob(sums.data() + b * chunks, chunks, numel, coefficients[3 * b + 2]));
  });
  return {drawn, mean, log_prob_B};
}

Tensor sde_step_backward(const OptionalTensor& grad_mean, const OptionalTensor& grad_log_prob_B, const Tensor& x,
                         const Tensor& velocity, const Tensor& coefficients_B3, const Tensor& x_next) {
  const std::vector<double> coefficients = check_step(x, velocity, coefficients_B3);
  check_like(x_next, "x_next", x);
  if (grad_mean) check_like(*grad_mean, "grad_mean", x);
  if (grad_log_prob_B) {
    check_argument(grad_log_prob_B->scalar_type() == x.scalar_type(), "grad_log_prob_B", "expected the dtype of x");
    check_per_sample(*grad_log_prob_B, "grad_log_prob_B", x);
  }
  const int64_t num_samples = x.size(0), numel = num_samples > 0 ? x.numel() / num_samples : 0;
  std::vector<double> of_distance = grad_log_prob_B ? numbers_of(*grad_log_prob_B) : std::vector<double>(num_samples);
  for (int64_t b = 0; b < num_samples; ++b) {
    const double std = coefficients[3 * b + 2];
    of_distance[b] = std == 0 ? 0 : of_distance[b] / (static_cast<double>(numel) * std * std);
  }
  const Tensor samples = dense(x), velocities = torch::stable::contiguous(velocity);
  const Tensor sampled = dense(x_next);
  const Tensor of_mean = dense(grad_mean.value_or(samples));
  const Tensor grad_velocity = torch::stable::empty_like(velocities);
  dispatch(samples, velocities, [&]<typename math_t, typename velocity_t>() {
    const math_t *x_first = samples.const_data_ptr<math_t>(), *x_next_first = sampled.const_data_ptr<math_t>();
    const math_t* grad_mean_first = of_mean.const_data_ptr<math_t>();
    const velocity_t* velocity_first = velocities.const_data_ptr<velocity_t>();
    velocity_t* out = grad_velocity.mutable_data_ptr<velocity_t>();
    for_each_piece(num_samples, numel, [&](int64_t b, int64_t i, int64_t n) {
      const int64_t at = b * numel + i;
      step_gradient(grad_mean ? grad_mean_first + at : nullptr, static_cast<math_t>(of_distance[b]), x_first + at,
                    velocity_first + at, x_next_first + at, step_of<math_t>(coefficients, b), out + at, n);
    });
  });
  return grad_velocity;
}

}  // namespace
}  // namespace dgpo_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(dgpo_fast, CPU, m) {
  m.impl("sde_step", TORCH_BOX(&dgpo_fast::cpu::sde_step));
  m.impl("sde_step_backward", TORCH_BOX(&dgpo_fast::cpu::sde_step_backward));
}
