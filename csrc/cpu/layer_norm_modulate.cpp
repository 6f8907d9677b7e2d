// The modulated layer norm on the CPU. Schema, equation and reference: dgpo_fast/ops/layer_norm_modulate.py.

#include "layer_norm.h"

#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "tokens.h"

namespace dgpo_fast::cpu {
namespace {

Tensor layer_norm_modulate(const Tensor& x_BND, const Tensor& shift_BD, const Tensor& scale_BD, double eps) {
  check_tokens(x_BND, "x_BND");
  check_modulation(shift_BD, "shift_BD", x_BND, "x_BND");
  check_modulation(scale_BD, "scale_BD", x_BND, "x_BND");
  check_eps(eps);
  const RowChunks chunks(x_BND);
  const WithRows x(x_BND), shift(shift_BD), scale(scale_BD);
  const Tensor y_BND = empty(x_BND, {chunks.num_samples, chunks.num_rows, chunks.width});
  dispatch_floating(x_BND.scalar_type(), [&]<typename scalar_t>() {
    using math_t = arithmetic_t<scalar_t>;
    const auto x_row = x.of<scalar_t>(), shift_row = shift.of<scalar_t>(), scale_row = scale.of<scalar_t>();
    scalar_t* y = y_BND.mutable_data_ptr<scalar_t>();
    chunks.for_each([&](int64_t b, int64_t, int64_t first, int64_t last) {
      std::vector<math_t> standard(chunks.width);
      for (int64_t n = first; n < last; ++n)
        norm_modulate(x_row(b, n), shift_row(b), scale_row(b), static_cast<math_t>(eps), standard.data(),
                      y + chunks.offset(b, n), chunks.width);
    });
  });
  return y_BND;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_modulate_backward(const Tensor& grad_BND, const Tensor& x_BND,
                                                                const Tensor& scale_BD, double eps,
                                                                bool with_modulation) {
  check_tokens(x_BND, "x_BND");
  check_alike(grad_BND, "grad_BND", x_BND, "x_BND");
  check_modulation(scale_BD, "scale_BD", x_BND, "x_BND");
  check_eps(eps);
  const RowChunks chunks(x_BND);
  const WithRows grad(grad_BND), x(x_BND), scale(scale_BD);
  const Tensor grad_x_BND = empty(x_BND, {chunks.num_samples, chunks.num_rows, chunks.width});
  Tensor grad_shift_BD, grad_scale_BD;
  dispatch_floating(x_BND.scalar_type(), [&]<typename scalar_t>() {
    using math_t = arithmetic_t<scalar_t>;
    const auto grad_row = grad.of<scalar_t>(), x_row = x.of<scalar_t>(), scale_row = scale.of<scalar_t>();
    scalar_t* grad_x = grad_x_BND.mutable_data_ptr<scalar_t>();
    RowSums<math_t> shift_sums(chunks, with_modulation), scale_sums(chunks, with_modulation);
    chunks.for_each([&](int64_t b, int64_t chunk, int64_t first, int64_t last) {
      std::vector<math_t> standard(chunks.width), total(chunks.width);
      for (int64_t n = first; n < last; ++n) {
        norm_modulate_backward(grad_row(b, n), x_row(b, n), scale_row(b), static_cast<math_t>(eps), standard.data(),
                               total.data(), chunks.width);
        round_row(total.data(), grad_x + chunks.offset(b, n), chunks.width);
        if (with_modulation)
          add_modulation_gradients(grad_row(b, n), standard.data(), shift_sums.of(b, chunk), scale_sums.of(b, chunk),
                                   chunks.width);
      }
    });
    grad_shift_BD = shift_sums.template finish<scalar_t>(x_BND);
    grad_scale_BD = scale_sums.template finish<scalar_t>(x_BND);
  });
  return {grad_x_BND, grad_shift_BD, grad_scale_BD};
}

}  // namespace
}  // namespace dgpo_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(dgpo_fast, CPU, m) {
  m.impl("layer_norm_modulate", TORCH_BOX(&dgpo_fast::cpu::layer_norm_modulate));
  m.impl("layer_norm_modulate_backward", TORCH_BOX(&dgpo_fast::cpu::layer_norm_modulate_backward));
}
