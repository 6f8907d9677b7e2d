// GELU of a biased input on the CPU. Schema, equation and reference: dgpo_fast/ops/bias_gelu.py.

#include "bias_gelu.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "dispatch.h"
#include "parallel.h"

namespace dgpo_fast::cpu {
namespace {

// Rows that are added up in one go: the order of the sums depends on their number alone, not on that of the threads.
constexpr int64_t kChunk = 32;

void check_arguments(const Tensor& x, const Tensor& bias_D) {
  check_argument(x.dim() >= 1, "x", "expected [..., D], got a scalar");
  check_floating(x, "x");
  check_argument(bias_D.scalar_type() == x.scalar_type(), "bias_D", "expected the dtype of x, ", dtype_name(x),
                 ", got ", dtype_name(bias_D));
  check_argument(bias_D.is_cpu(), "bias_D", "expected the device of x, cpu");
  const int64_t width = x.size(x.dim() - 1);
  check_argument(bias_D.dim() == 1 && bias_D.size(0) == width, "bias_D", "expected [", width,
                 "], a number for each element of a row");
}

void check_gradient(const Tensor& grad, const Tensor& x) {
  check_argument(grad.scalar_type() == x.scalar_type(), "grad", "expected the dtype of x, ", dtype_name(x), ", got ",
                 dtype_name(grad));
  check_argument(grad.is_cpu(), "grad", "expected the device of x, cpu");
  check_argument(grad.dim() == x.dim() && grad.size(0) == x.size(0) && has_samples_like(grad, x), "grad",
                 "expected the shape of x");
}

int64_t num_rows_of(const Tensor& x, int64_t width) { return width > 0 ? x.numel() / width : 0; }

Tensor bias_gelu(const Tensor& x, const Tensor& bias_D) {
  check_arguments(x, bias_D);
  const Tensor rows = torch::stable::contiguous(x), bias = torch::stable::contiguous(bias_D);
  const Tensor y = torch::stable::empty_like(rows);
  const int64_t width = bias.size(0);
  dispatch_floating(x.scalar_type(), [&]<typename value_t>() {
    using math_t = arithmetic_t<value_t>;
    const value_t *of_x = rows.const_data_ptr<value_t>(), *of_bias = bias.const_data_ptr<value_t>();
    value_t* out = y.mutable_data_ptr<value_t>();
    for_each_piece(num_rows_of(x, width), width, [&](int64_t row, int64_t i, int64_t n) {
      const int64_t at = row * width + i;
      biased_gelu<math_t>(of_x + at, of_bias + i, out + at, n);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& grad, const Tensor& x, const Tensor& bias_D,
                                              bool with_bias) {
  check_arguments(x, bias_D);
  check_gradient(grad, x);
  const Tensor of_y = torch::stable::contiguous(grad), rows = torch::stable::contiguous(x);
  const Tensor bias = torch::stable::contiguous(bias_D);
  const Tensor grad_x = torch::stable::empty_like(rows);
  const int64_t width = bias.size(0), num_rows = num_rows_of(x, width);
  const int64_t num_chunks = (num_rows + kChunk - 1) / kChunk;
  const Tensor grad_bias = empty(bias, {with_bias ? width : 0});
  dispatch_floating(x.scalar_type(), [&]<typename value_t>() {
    using math_t = arithmetic_t<value_t>;
    const value_t *of_grad = of_y.const_data_ptr<value_t>(), *of_x = rows.const_data_ptr<value_t>();
    const value_t* of_bias = bias.const_data_ptr<value_t>();
    value_t* out = grad_x.mutable_data_ptr<value_t>();
    std::vector<math_t> partial(with_bias ? num_chunks * width : 0);
    const int64_t chunks_per_task = std::max<int64_t>(1, kGrainSize / std::max<int64_t>(1, kChunk * width));
    torch::stable::parallel_for(0, num_chunks, chunks_per_task, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * kChunk; row < std::min(end * kChunk, num_rows); ++row) {
        math_t* sums = with_bias ? &partial[row / kChunk * width] : nullptr;
        const int64_t at = row * width;
        biased_gelu_backward<math_t>(of_grad + at, of_x + at, of_bias, out + at, sums, width);
      }
    });
    if (!with_bias) return;
    std::vector<double> sums(width);
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk)
      for (int64_t d = 0; d < width; ++d) sums[d] += partial[chunk * width + d];
    value_t* out_bias = grad_bias.mutable_data_ptr<value_t>();
    for (int64_t d = 0; d < width; ++d) out_bias[d] = static_cast<value_t>(static_cast<math_t>(sums[d]));
  });
  return {grad_x, grad_bias};
}

}  // namespace
}  // namespace dgpo_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(dgpo_fast, CPU, m) {
  m.impl("bias_gelu", TORCH_BOX(&dgpo_fast::cpu::bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&dgpo_fast::cpu::bias_gelu_backward));
}
