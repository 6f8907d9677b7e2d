// Gated residual and modulated layer norm in one pass, on the CPU. Schema, equations and reference:
// dgpo_fast/ops/gate_residual_norm_modulate.py.

#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "gate_residual.h"
#include "layer_norm.h"
#include "tokens.h"

namespace dgpo_fast::cpu {
namespace {

std::tuple<Tensor, Tensor> gate_residual_norm_modulate(const Tensor& x_BND, const Tensor& y_BND, const Tensor& gate_BD,
                                                       const Tensor& shift_BD, const Tensor& scale_BD, double eps) {
  check_tokens(x_BND, "x_BND");
  check_alike(y_BND, "y_BND", x_BND, "x_BND");
  check_modulation(gate_BD, "gate_BD", x_BND, "x_BND");
  check_modulation(shift_BD, "shift_BD", x_BND, "x_BND");
  check_modulation(scale_BD, "scale_BD", x_BND, "x_BND");
  check_eps(eps);
  const RowChunks chunks(x_BND);
  const WithRows x(x_BND), y(y_BND), gate(gate_BD), shift(shift_BD), scale(scale_BD);
  const Tensor hidden_BND = empty(x_BND, {chunks.num_samples, chunks.num_rows, chunks.width});
  const Tensor normed_BND = torch::stable::empty_like(hidden_BND);
  dispatch_floating(x_BND.scalar_type(), [&]<typename scalar_t>() {
    using math_t = arithmetic_t<scalar_t>;
    const auto x_row = x.of<scalar_t>(), y_row = y.of<scalar_t>(), gate_row = gate.of<scalar_t>(),
               shift_row = shift.of<scalar_t>(), scale_row = scale.of<scalar_t>();
    scalar_t* hidden = hidden_BND.mutable_data_ptr<scalar_t>();
    scalar_t* normed = normed_BND.mutable_data_ptr<scalar_t>();
    chunks.for_each([&](int64_t b, int64_t, int64_t first, int64_t last) {
      std::vector<math_t> standard(chunks.width);
      for (int64_t n = first; n < last; ++n) {
        const int64_t at = chunks.offset(b, n);
        add_gated<math_t>(x_row(b, n), y_row(b, n), gate_row(b), hidden + at, chunks.width);
        norm_modulate(hidden + at, shift_row(b), scale_row(b), static_cast<math_t>(eps), standard.data(), normed + at,
                      chunks.width);
      }
    });
  });
  return {hidden_BND, normed_BND};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gate_residual_norm_modulate_backward(
    const std::optional<Tensor>& grad_hidden_BND, const Tensor& grad_normed_BND, const Tensor& hidden_BND,
    const std::optional<Tensor>& y_BND, const Tensor& gate_BD, const Tensor& scale_BD, double eps) {
  check_tokens(hidden_BND, "hidden_BND");
  if (grad_hidden_BND) check_alike(*grad_hidden_BND, "grad_hidden_BND", hidden_BND, "hidden_BND");
  check_alike(grad_normed_BND, "grad_normed_BND", hidden_BND, "hidden_BND");
  if (y_BND) check_alike(*y_BND, "y_BND", hidden_BND, "hidden_BND");
  check_modulation(gate_BD, "gate_BD", hidden_BND, "hidden_BND");
  check_modulation(scale_BD, "scale_BD", hidden_BND, "hidden_BND");
  check_eps(eps);
  const RowChunks chunks(hidden_BND);
  const WithRows grad_hidden(grad_hidden_BND.value_or(hidden_BND)), grad_normed(grad_normed_BND), hidden(hidden_BND),
      y(y_BND.value_or(hidden_BND)), gate(gate_BD), scale(scale_BD);
  const Tensor grad_x_BND = empty(hidden_BND, {chunks.num_samples, chunks.num_rows, chunks.width});
  const Tensor grad_y_BND = torch::stable::empty_like(grad_x_BND);
  Tensor grad_gate_BD, grad_shift_BD, grad_scale_BD;
  dispatch_floating(hidden_BND.scalar_type(), [&]<typename scalar_t>() {
    using math_t = arithmetic_t<scalar_t>;
    const auto grad_hidden_row = grad_hidden.of<scalar_t>(), grad_normed_row = grad_normed.of<scalar_t>(),
               hidden_row = hidden.of<scalar_t>(), y_row = y.of<scalar_t>(), gate_row = gate.of<scalar_t>(),
               scale_row = scale.of<scalar_t>();
    scalar_t* grad_x = grad_x_BND.mutable_data_ptr<scalar_t>();
    scalar_t* grad_y = grad_y_BND.mutable_data_ptr<scalar_t>();
    const bool with_modulation = y_BND.has_value();
    RowSums<math_t> gate_sums(chunks, with_modulation), shift_sums(chunks, with_modulation),
        scale_sums(chunks, with_modulation);
    chunks.for_each([&](int64_t b, int64_t chunk, int64_t first, int64_t last) {
      std::vector<math_t> standard(chunks.width), total(chunks.width);
      for (int64_t n = first; n < last; ++n) {
        const int64_t at = chunks.offset(b, n);
        norm_modulate_backward(grad_normed_row(b, n), hidden_row(b, n), scale_row(b), static_cast<math_t>(eps),
                               standard.data(), total.data(), chunks.width);
        if (grad_hidden_BND) add_row(grad_hidden_row(b, n), total.data(), chunks.width);
        round_row(total.data(), grad_x + at, chunks.width);
        gate_backward<math_t>(total.data(), gate_row(b), grad_y + at, chunks.width);
        if (!with_modulation) continue;
        add_gate_gradient(total.data(), y_row(b, n), gate_sums.of(b, chunk), chunks.width);
        add_modulation_gradients(grad_normed_row(b, n), standard.data(), shift_sums.of(b, chunk),
                                 scale_sums.of(b, chunk), chunks.width);
      }
    });
    grad_gate_BD = gate_sums.template finish<scalar_t>(hidden_BND);
    grad_shift_BD = shift_sums.template finish<scalar_t>(hidden_BND);
    grad_scale_BD = scale_sums.template finish<scalar_t>(hidden_BND);
  });
  return {grad_x_BND, grad_y_BND, grad_gate_BD, grad_shift_BD, grad_scale_BD};
}

}  // namespace
}  // namespace dgpo_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(dgpo_fast, CPU, m) {
  m.impl("gate_residual_norm_modulate", TORCH_BOX(&dgpo_fast::cpu::gate_residual_norm_modulate));
  m.impl("gate_residual_norm_modulate_backward", TORCH_BOX(&dgpo_fast::cpu::gate_residual_norm_modulate_backward));
}
