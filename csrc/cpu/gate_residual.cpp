// The gated residual on the CPU. Schema, equation and reference: dgpo_fast/ops/gate_residual.py.

#include "gate_residual.h"

#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "tokens.h"

namespace dgpo_fast::cpu {
namespace {

Tensor gate_residual(const Tensor& x_BND, const Tensor& y_BND, const Tensor& gate_BD) {
  check_tokens(x_BND, "x_BND");
  check_alike(y_BND, "y_BND", x_BND, "x_BND");
  check_modulation(gate_BD, "gate_BD", x_BND, "x_BND");
  const RowChunks chunks(x_BND);
  const WithRows x(x_BND), y(y_BND), gate(gate_BD);
  const Tensor hidden_BND = empty(x_BND, {chunks.num_samples, chunks.num_rows, chunks.width});
  dispatch_floating(x_BND.scalar_type(), [&]<typename scalar_t>() {
    const auto x_row = x.of<scalar_t>(), y_row = y.of<scalar_t>(), gate_row = gate.of<scalar_t>();
    scalar_t* hidden = hidden_BND.mutable_data_ptr<scalar_t>();
    chunks.for_each([&](int64_t b, int64_t, int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n)
        add_gated<arithmetic_t<scalar_t>>(x_row(b, n), y_row(b, n), gate_row(b), hidden + chunks.offset(b, n),
                                          chunks.width);
    });
  });
  return hidden_BND;
}

std::tuple<Tensor, Tensor> gate_residual_backward(const Tensor& grad_BND, const std::optional<Tensor>& y_BND,
                                                  const Tensor& gate_BD) {
  check_tokens(grad_BND, "grad_BND");
  if (y_BND) check_alike(*y_BND, "y_BND", grad_BND, "grad_BND");
  check_modulation(gate_BD, "gate_BD", grad_BND, "grad_BND");
  const RowChunks chunks(grad_BND);
  const WithRows grad(grad_BND), y(y_BND.value_or(grad_BND)), gate(gate_BD);
  const Tensor grad_y_BND = empty(grad_BND, {chunks.num_samples, chunks.num_rows, chunks.width});
  Tensor grad_gate_BD;
  dispatch_floating(grad_BND.scalar_type(), [&]<typename scalar_t>() {
    using math_t = arithmetic_t<scalar_t>;
    const auto grad_row = grad.of<scalar_t>(), y_row = y.of<scalar_t>(), gate_row = gate.of<scalar_t>();
    scalar_t* grad_y = grad_y_BND.mutable_data_ptr<scalar_t>();
    RowSums<math_t> gate_sums(chunks, y_BND.has_value());
    chunks.for_each([&](int64_t b, int64_t chunk, int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        gate_backward<math_t>(grad_row(b, n), gate_row(b), grad_y + chunks.offset(b, n), chunks.width);
        if (y_BND) add_gate_gradient(grad_row(b, n), y_row(b, n), gate_sums.of(b, chunk), chunks.width);
      }
    });
    grad_gate_BD = gate_sums.template finish<scalar_t>(grad_BND);
  });
  return {grad_y_BND, grad_gate_BD};
}

}  // namespace
}  // namespace dgpo_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(dgpo_fast, CPU, m) {
  m.impl("gate_residual", TORCH_BOX(&dgpo_fast::cpu::gate_residual));
  m.impl("gate_residual_backward", TORCH_BOX(&dgpo_fast::cpu::gate_residual_backward));
}
