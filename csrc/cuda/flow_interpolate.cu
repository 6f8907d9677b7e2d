// The forward process on CUDA. Schema, equation, checks and reference: dgpo_fast/ops/flow_interpolate.py.

#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "dispatch.h"
#include "launch.h"
#include "noise.h"

namespace dgpo_fast::cuda {
namespace {

template <typename sample_t>
struct Operands {
  const sample_t* x0;  // [B, N]
  const double* sigma_B;
  GroupNoise<sample_t> noise;
  sample_t* x_t;     // [B, N]
  sample_t* target;  // [B, N], or null
  int64_t x0_stride_b, sample_numel, blocks_per_sample;
};

template <int kCount, bool kDrawn, typename math_t, typename sample_t>
__global__ void __launch_bounds__(kThreads) flow_interpolate_kernel(const Operands<sample_t> at) {
  const int64_t b = blockIdx.x / at.blocks_per_sample;
  const int64_t i = ((blockIdx.x % at.blocks_per_sample) * kThreads + threadIdx.x) * kCount;
  if (i >= at.sample_numel) return;
  const int64_t group = at.noise.group_of(b);
  // What cannot be interpolated becomes NaN: to raise would wait for the device.
  const bool valid = group >= 0 && at.sigma_B[b] >= 0;
  const math_t sigma = valid ? static_cast<math_t>(at.sigma_B[b]) : static_cast<math_t>(NAN);

  math_t x0[kCount], eps[kCount], x_t[kCount];
  load<kCount>(at.x0 + b * at.x0_stride_b + i, x0);
  at.noise.template load_elements<kDrawn, kCount>(valid ? group : 0, i, eps);
#pragma unroll
  for (int n = 0; n < kCount; ++n) x_t[n] = (1 - sigma) * x0[n] + sigma * eps[n];
  store<kCount>(at.x_t + b * at.sample_numel + i, x_t);
  if (at.target == nullptr) return;
  math_t target[kCount];
#pragma unroll
  for (int n = 0; n < kCount; ++n) target[n] = valid ? eps[n] - x0[n] : static_cast<math_t>(NAN);
  store<kCount>(at.target + b * at.sample_numel + i, target);
}

template <typename grad_t>
struct BackwardOperands {
  const grad_t* grad_x_t;     // [B, N]
  const grad_t* grad_target;  // [B, N], or null
  const double* sigma_B;
  grad_t* grad_x0;  // [B, N]
  int64_t grad_x_t_stride_b, grad_target_stride_b, sample_numel, blocks_per_sample;
};

template <int kCount, typename math_t, typename grad_t>
__global__ void __launch_bounds__(kThreads) flow_interpolate_backward_kernel(const BackwardOperands<grad_t> at) {
  const int64_t b = blockIdx.x / at.blocks_per_sample;
  const int64_t i = ((blockIdx.x % at.blocks_per_sample) * kThreads + threadIdx.x) * kCount;
  if (i >= at.sample_numel) return;
  const math_t rest = 1 - static_cast<math_t>(at.sigma_B[b]);
  math_t grad[kCount], of_target[kCount] = {};
  load<kCount>(at.grad_x_t + b * at.grad_x_t_stride_b + i, grad);
  if (at.grad_target != nullptr) load<kCount>(at.grad_target + b * at.grad_target_stride_b + i, of_target);
#pragma unroll
  for (int n = 0; n < kCount; ++n) grad[n] = rest * grad[n] - of_target[n];
  store<kCount>(at.grad_x0 + b * at.sample_numel + i, grad);
}

Tensor dense_doubles(const Tensor& numbers) {
  return dense(torch::stable::to(numbers, ScalarType::Double));
}

std::tuple<Tensor, Tensor> flow_interpolate(const Tensor& x0, const Tensor& sigma_B, const std::optional<Tensor>& noise,
                                            const std::optional<Tensor>& streams, const Tensor& group_B,
                                            bool with_target) {
  const torch::stable::accelerator::DeviceGuard guard(x0.get_device_index());
  const Tensor x_t = torch::stable::empty(x0.sizes(), x0.scalar_type(), std::nullopt, x0.device());
  const Tensor target = with_target ? torch::stable::empty_like(x_t) : empty(x_t, {0});
  if (x0.numel() == 0) return {x_t, target};
  const Tensor samples = with_contiguous_from(x0, 1), sigmas = dense_doubles(sigma_B);
  const NoiseTensors noises(noise, streams, group_B);
  const int64_t sample_numel = x0.numel() / x0.size(0);
  const Grid grid{x0.size(0), sample_numel,
                  sample_numel % kVector == 0 && is_aligned(samples) && noises.can_vectorise()};
  const cudaStream_t stream = current_stream(x0);
  dispatch_floating(x0.scalar_type(), [&]<typename sample_t>() {
    const Operands<sample_t> at{
        samples.const_data_ptr<sample_t>(),
        sigmas.const_data_ptr<double>(),
        noises.operands<sample_t>(),
        x_t.mutable_data_ptr<sample_t>(),
        with_target ? target.mutable_data_ptr<sample_t>() : nullptr,
        samples.stride(0),
        sample_numel,
        grid.blocks_per_sample(),
    };
    dispatch_grid(grid, noises.is_drawn(), [&]<int kCount, bool kDrawn>() {
      flow_interpolate_kernel<kCount, kDrawn, arithmetic_t<sample_t>><<<grid.blocks(), kThreads, 0, stream>>>(at);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {x_t, target};
}

Tensor flow_interpolate_backward(const Tensor& grad_x_t, const std::optional<Tensor>& grad_target,
                                 const Tensor& sigma_B) {
  const torch::stable::accelerator::DeviceGuard guard(grad_x_t.get_device_index());
  const Tensor grad_x0 =
      torch::stable::empty(grad_x_t.sizes(), grad_x_t.scalar_type(), std::nullopt, grad_x_t.device());
  if (grad_x_t.numel() == 0) return grad_x0;
  const Tensor of_x_t = with_contiguous_from(grad_x_t, 1);
  const Tensor of_target = grad_target ? with_contiguous_from(*grad_target, 1) : of_x_t;
  const Tensor sigmas = dense_doubles(sigma_B);
  const int64_t sample_numel = grad_x_t.numel() / grad_x_t.size(0);
  const Grid grid{grad_x_t.size(0), sample_numel,
                  sample_numel % kVector == 0 && is_aligned(of_x_t) && is_aligned(of_target)};
  const cudaStream_t stream = current_stream(grad_x_t);
  dispatch_floating(grad_x_t.scalar_type(), [&]<typename grad_t>() {
    const BackwardOperands<grad_t> at{
        of_x_t.const_data_ptr<grad_t>(),
        grad_target ? of_target.const_data_ptr<grad_t>() : nullptr,
        sigmas.const_data_ptr<double>(),
        grad_x0.mutable_data_ptr<grad_t>(),
        of_x_t.stride(0),
        of_target.stride(0),
        sample_numel,
        grid.blocks_per_sample(),
    };
    if (grid.vectorised)
      flow_interpolate_backward_kernel<kVector, arithmetic_t<grad_t>><<<grid.blocks(), kThreads, 0, stream>>>(at);
    else
      flow_interpolate_backward_kernel<1, arithmetic_t<grad_t>><<<grid.blocks(), kThreads, 0, stream>>>(at);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return grad_x0;
}

}  // namespace
}  // namespace dgpo_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(dgpo_fast_cuda, CUDA, m) {
  m.impl("flow_interpolate", TORCH_BOX(&dgpo_fast::cuda::flow_interpolate));
  m.impl("flow_interpolate_backward", TORCH_BOX(&dgpo_fast::cuda::flow_interpolate_backward));
}
