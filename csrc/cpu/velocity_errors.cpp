// Denoising errors on the CPU. Schema, equations and reference: dgpo_fast/ops/velocity_errors.py.

#include "velocity_errors.h"

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

void check_like(const OptionalTensor& tensor, const char* name, const Tensor& velocity) {
  if (!tensor) return;
  check_argument(tensor->scalar_type() == velocity.scalar_type(), name, "expected the dtype of velocity, ",
                 dtype_name(velocity), ", got ", dtype_name(*tensor));
  check_argument(has_samples_like(*tensor, velocity) && tensor->size(0) == velocity.size(0), name,
                 "expected the shape of velocity");
  check_argument(tensor->is_cpu(), name, "expected the device of velocity, cpu");
}

void check_arguments(const Tensor& velocity, const Tensor& x0, const OptionalTensor& noise,
                     const OptionalTensor& streams, const Tensor& group_M, const OptionalTensor& old,
                     const OptionalTensor& reference, const OptionalTensor& unconditional) {
  check_argument(velocity.dim() >= 1, "velocity", "expected [M, ...], got a scalar");
  check_floating(velocity, "velocity");
  check_argument(is_one_of(x0, {ScalarType::Float, ScalarType::Double}), "x0", "expected float32 or float64, got ",
                 dtype_name(x0));
  check_argument(x0.is_cpu(), "x0", "expected the device of velocity, cpu");
  check_argument(x0.dim() == velocity.dim() && x0.size(0) == velocity.size(0) && has_samples_like(x0, velocity), "x0",
                 "expected the shape of velocity");
  check_noise(x0, noise, streams, group_M, "group_M");
  check_argument(!unconditional || reference, "unconditional", "expected None without reference");
  check_like(old, "old", velocity);
  check_like(reference, "reference", velocity);
  check_like(unconditional, "unconditional", velocity);
}

// The velocities as blocks of memory, with stand-ins for what is absent.
struct DenseVelocities {
  Tensor policy, old, reference, unconditional;

  DenseVelocities(const Tensor& velocity, const OptionalTensor& old_or_none, const OptionalTensor& reference_or_none,
                  const OptionalTensor& unconditional_or_none)
      : policy(dense(velocity)),
        old(old_or_none ? dense(*old_or_none) : policy),
        reference(reference_or_none ? dense(*reference_or_none) : policy),
        unconditional(unconditional_or_none ? dense(*unconditional_or_none) : reference) {}

  template <typename velocity_t>
  Velocities<velocity_t> pointers() const {
    return {policy.const_data_ptr<velocity_t>(), old.const_data_ptr<velocity_t>(),
            reference.const_data_ptr<velocity_t>(), unconditional.const_data_ptr<velocity_t>()};
  }
};

// Calls `body.operator()<math_t, velocity_t>()`: the arithmetic has the dtype of x0.
template <typename Body>
void dispatch(const Tensor& x0, const Tensor& velocity, const Body& body) {
  dispatch_floating(velocity.scalar_type(), [&]<typename velocity_t>() {
    if (x0.scalar_type() == ScalarType::Double)
      body.template operator()<double, velocity_t>();
    else
      body.template operator()<float, velocity_t>();
  });
}

using Errors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Errors velocity_errors(const Tensor& velocity, const Tensor& x0, const OptionalTensor& noise,
                       const OptionalTensor& streams, const Tensor& group_M, const OptionalTensor& old,
                       const OptionalTensor& reference, const OptionalTensor& unconditional, double guidance) {
  check_arguments(velocity, x0, noise, streams, group_M, old, reference, unconditional);
  const Tensor samples = dense(x0);
  const DenseVelocities velocities(velocity, old, reference, unconditional);
  const GroupNoise group_noise(noise, streams, group_M);
  const int64_t num_samples = x0.size(0), numel = num_samples > 0 ? x0.numel() / num_samples : 0;
  const int64_t num_old = old ? num_samples : 0, num_reference = reference ? num_samples : 0;
  const Tensor errors[kNumErrors] = {empty(samples, {num_samples}), empty(samples, {num_old}),
                                     empty(samples, {num_reference}), empty(samples, {num_reference})};
  dispatch(samples, velocity, [&]<typename math_t, typename velocity_t>() {
    const int64_t chunks = GroupNoise::num_chunks(numel);
    std::vector<double> partial(num_samples * chunks * kNumErrors);
    const math_t* x0_first = samples.const_data_ptr<math_t>();
    const Velocities<velocity_t> v = velocities.pointers<velocity_t>();
    group_noise.for_each_piece<math_t>(numel, [&](int64_t m, int64_t first, int64_t n, const auto* eps) {
      double sums[kNumErrors];
      const int64_t at = m * numel + first;
      sum_squares<math_t>(x0_first + at, eps, v + at, static_cast<math_t>(guidance), n, sums);
      std::copy_n(sums, kNumErrors, &partial[(m * chunks + first / GroupNoise::kChunk) * kNumErrors]);
    });
    for (int row = 0; row < kNumErrors; ++row) {
      math_t* out = errors[row].mutable_data_ptr<math_t>();
      for (int64_t m = 0; m < errors[row].numel(); ++m) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[(m * chunks + chunk) * kNumErrors + row];
        out[m] = static_cast<math_t>(sum / static_cast<double>(numel));
      }
    }
  });
  return {errors[kPolicy], errors[kOld], errors[kReference], errors[kDistance]};
}

void check_gradient(const Tensor& grad, const char* name, const Tensor& x0) {
  check_argument(grad.is_cpu() && grad.scalar_type() == x0.scalar_type(), name, "expected the dtype and device of x0");
  check_per_sample(grad, name, x0);
}

Tensor velocity_errors_backward(const Tensor& grad_policy_M, const OptionalTensor& grad_distance_M,
                                const Tensor& velocity, const Tensor& x0, const OptionalTensor& noise,
                                const OptionalTensor& streams, const Tensor& group_M, const OptionalTensor& reference,
                                const OptionalTensor& unconditional, double guidance) {
  check_arguments(velocity, x0, noise, streams, group_M, std::nullopt, reference, unconditional);
  const int64_t num_samples = x0.size(0), numel = num_samples > 0 ? x0.numel() / num_samples : 0;
  check_gradient(grad_policy_M, "grad_policy_M", x0);
  check_argument(!grad_distance_M || reference, "grad_distance_M", "expected None without reference");
  if (grad_distance_M) check_gradient(*grad_distance_M, "grad_distance_M", x0);
  const Tensor samples = dense(x0);
  const DenseVelocities velocities(velocity, std::nullopt, reference, unconditional);
  const GroupNoise group_noise(noise, streams, group_M);
  const std::vector<double> policy_grads = numbers_of(grad_policy_M);
  const std::vector<double> distance_grads =
      grad_distance_M ? numbers_of(*grad_distance_M) : std::vector<double>(num_samples);
  const Tensor grad_velocity = torch::stable::empty_like(velocities.policy);
  dispatch(samples, velocity, [&]<typename math_t, typename velocity_t>() {
    const math_t* x0_first = samples.const_data_ptr<math_t>();
    const Velocities<velocity_t> v = velocities.pointers<velocity_t>();
    velocity_t* out = grad_velocity.mutable_data_ptr<velocity_t>();
    const double scale = 2.0 / static_cast<double>(numel);
    group_noise.for_each_piece<math_t>(numel, [&](int64_t m, int64_t first, int64_t n, const auto* eps) {
      const int64_t at = m * numel + first;
      const math_t of_target = static_cast<math_t>(scale * policy_grads[m]);
      const math_t of_reference = static_cast<math_t>(scale * distance_grads[m]);
      velocity_gradient<math_t>(x0_first + at, eps, v + at, static_cast<math_t>(guidance), of_target, of_reference,
                                out + at, n);
    });
  });
  return grad_velocity;
}

}  // namespace
}  // namespace dgpo_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(dgpo_fast, CPU, m) {
  m.impl("velocity_errors", TORCH_BOX(&dgpo_fast::cpu::velocity_errors));
  m.impl("velocity_errors_backward", TORCH_BOX(&dgpo_fast::cpu::velocity_errors_backward));
}
