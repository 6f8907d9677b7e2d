// The forward process on the CPU. Schema, equation and reference: dgpo_fast/ops/flow_interpolate.py.

#include "flow_interpolate.h"

#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "noise.h"

namespace dgpo_fast::cpu {
namespace {

void check_arguments(const Tensor& x0, const Tensor& sigma_B, const std::optional<Tensor>& noise,
                     const std::optional<Tensor>& streams, const Tensor& group_B) {
  check_argument(x0.dim() >= 1, "x0", "expected [B, ...], got a scalar");
  check_floating(x0, "x0");
  check_per_sample(sigma_B, "sigma_B", x0);
  check_argument(is_one_of(sigma_B, {ScalarType::Float, ScalarType::Double}), "sigma_B",
                 "expected float32 or float64, got ", dtype_name(sigma_B));
  check_noise(x0, noise, streams, group_B, "group_B");
  for (double sigma : numbers_of(sigma_B))
    check_argument(sigma >= 0, "sigma_B", "expected numbers that are not negative, got ", sigma);
}

std::tuple<Tensor, Tensor> flow_interpolate(const Tensor& x0, const Tensor& sigma_B, const std::optional<Tensor>& noise,
                                            const std::optional<Tensor>& streams, const Tensor& group_B,
                                            bool with_target) {
  check_arguments(x0, sigma_B, noise, streams, group_B);
  const Tensor samples = dense(x0);
  const GroupNoise group_noise(noise, streams, group_B);
  const std::vector<double> sigmas = numbers_of(sigma_B);
  const Tensor x_t = torch::stable::empty_like(samples);
  const Tensor target = with_target ? torch::stable::empty_like(samples) : empty(samples, {0});
  const int64_t numel = x0.size(0) > 0 ? x0.numel() / x0.size(0) : 0;
  dispatch_floating(x0.scalar_type(), [&]<typename sample_t>() {
    using math_t = arithmetic_t<sample_t>;
    const sample_t* x0_first = samples.const_data_ptr<sample_t>();
    sample_t* x_t_first = x_t.mutable_data_ptr<sample_t>();
    sample_t* target_first = with_target ? target.mutable_data_ptr<sample_t>() : nullptr;
    group_noise.for_each_piece<sample_t>(numel, [&](int64_t b, int64_t first, int64_t n, const auto* eps) {
      const int64_t at = b * numel + first;
      interpolate<math_t>(x0_first + at, eps, static_cast<math_t>(sigmas[b]), x_t_first + at,
                          with_target ? target_first + at : nullptr, n);
    });
  });
  return {x_t, target};
}

Tensor flow_interpolate_backward(const Tensor& grad_x_t, const std::optional<Tensor>& grad_target,
                                 const Tensor& sigma_B) {
  check_floating(grad_x_t, "grad_x_t");
  check_argument(grad_x_t.dim() >= 1, "grad_x_t", "expected [B, ...], got a scalar");
  check_per_sample(sigma_B, "sigma_B", grad_x_t);
  check_argument(is_one_of(sigma_B, {ScalarType::Float, ScalarType::Double}), "sigma_B",
                 "expected float32 or float64, got ", dtype_name(sigma_B));
  if (grad_target) {
    check_argument(grad_target->scalar_type() == grad_x_t.scalar_type(), "grad_target", "expected the dtype of grad_x_t");
    check_argument(grad_target->is_cpu() && grad_target->dim() == grad_x_t.dim() &&
                       grad_target->size(0) == grad_x_t.size(0) && has_samples_like(*grad_target, grad_x_t),
                   "grad_target", "expected the shape and device of grad_x_t");
  }
  const std::vector<double> sigmas = numbers_of(sigma_B);
  const Tensor of_x_t = dense(grad_x_t);
  const std::optional<Tensor> of_target = grad_target ? std::optional(dense(*grad_target)) : std::nullopt;
  const Tensor grad_x0 = empty_like(of_x_t);
  const int64_t numel = of_x_t.size(0) > 0 ? of_x_t.numel() / of_x_t.size(0) : 0;
  dispatch_floating(of_x_t.scalar_type(), [&]<typename grad_t>() {
    using math_t = arithmetic_t<grad_t>;
    const grad_t* x_t_grads = of_x_t.const_data_ptr<grad_t>();
    const grad_t* target_grads = of_target ? of_target->const_data_ptr<grad_t>() : nullptr;
    grad_t* out = grad_x0.mutable_data_ptr<grad_t>();
    for_each_piece(of_x_t.size(0), numel, [&](int64_t b, int64_t i, int64_t n) {
      const int64_t at = b * numel + i;
      interpolate_backward<math_t>(x_t_grads + at, target_grads == nullptr ? nullptr : target_grads + at,
                                   static_cast<math_t>(sigmas[b]), out + at, n);
    });
  });
  return grad_x0;
}

}  // namespace
}  // namespace dgpo_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(dgpo_fast, CPU, m) {
  m.impl("flow_interpolate", TORCH_BOX(&dgpo_fast::cpu::flow_interpolate));
  m.impl("flow_interpolate_backward", TORCH_BOX(&dgpo_fast::cpu::flow_interpolate_backward));
}
