// One SDE step on CUDA. Schema, equations, checks and reference: dgpo_fast/ops/sde_step.py.

#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "dispatch.h"
#include "launch.h"
#include "noise.h"

namespace dgpo_fast::cuda {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int kWarp = 32;
constexpr double kHalfLogTwoPi = 0.91893853320467274178;

template <typename math_t, typename velocity_t>
struct Operands {
  const math_t* x;             // [B, N]
  const velocity_t* velocity;  // [B, N]
  const double* coefficients;  // [B, 3]
  const math_t* x_next;        // [B, N], or null where it is drawn
  int64_t x_stride, velocity_stride, x_next_stride;
  int64_t sample_numel, blocks_per_sample;
};

// of_x x + of_velocity velocity, explicitly fused: the same bits in every kernel.
template <int kCount, typename math_t, typename velocity_t>
__device__ __forceinline__ void load_mean(const Operands<math_t, velocity_t>& at, int64_t b, int64_t i, int count,
                                          math_t (&mean)[kVector]) {
  const math_t of_x = static_cast<math_t>(at.coefficients[3 * b]);
  const math_t of_velocity = static_cast<math_t>(at.coefficients[3 * b + 1]);
  math_t x[kVector], velocity[kVector];
  load_piece<kCount>(at.x + b * at.x_stride + i, count, x);
  load_piece<kCount>(at.velocity + b * at.velocity_stride + i, count, velocity);
#pragma unroll
  for (int n = 0; n < kVector; ++n) mean[n] = fma(of_velocity, velocity[n], of_x * x[n]);
}

// The sum over a block's threads, in an order that is always the same; for thread 0.
template <typename math_t>
__device__ __forceinline__ math_t sum_over_block(math_t sum) {
  __shared__ math_t of_warp[kThreads / kWarp];
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) sum += __shfl_down_sync(0xffffffffu, sum, distance);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sum;
  __syncthreads();
  sum = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / kWarp; ++warp) sum += of_warp[warp];
  return sum;
}

// `mean_out` may be null. Writes the squared distances' sum to partial[b, block].
template <int kCount, bool kDrawn, typename math_t, typename velocity_t>
__global__ void __launch_bounds__(kThreads)
    sde_step_kernel(const Operands<math_t, velocity_t> at, const GroupNoise<math_t> noise, math_t* drawn,
                    math_t* mean_out, math_t* partial) {
  const int64_t b = blockIdx.x / at.blocks_per_sample, block = blockIdx.x % at.blocks_per_sample;
  const int64_t i = (block * kThreads + threadIdx.x) * kVector;
  math_t sum = 0;
  if (i < at.sample_numel) {
    const int count = static_cast<int>(min(int64_t{kVector}, at.sample_numel - i));
    math_t mean[kVector], x_next[kVector] = {};
    load_mean<kCount>(at, b, i, count, mean);
    if (mean_out != nullptr) store_piece<kCount>(mean_out + b * at.sample_numel + i, count, mean);
    if (at.x_next != nullptr) {
      load_piece<kCount>(at.x_next + b * at.x_next_stride + i, count, x_next);
    } else {
      const int64_t group = noise.group_of(b);
      // A group that does not exist: to raise would wait for the device.
      const math_t std = group < 0 ? static_cast<math_t>(NAN) : static_cast<math_t>(at.coefficients[3 * b + 2]);
      math_t z[kVector];
      noise.template load_piece_of<kDrawn, kCount>(group < 0 ? 0 : group, i, count, z);
#pragma unroll
      for (int n = 0; n < kVector; ++n) x_next[n] = fma(std, z[n], mean[n]);
      store_piece<kCount>(drawn + b * at.sample_numel + i, count, x_next);
    }
#pragma unroll
    for (int n = 0; n < kVector; ++n) {
      const math_t distance = n < count ? x_next[n] - mean[n] : math_t{0};
      sum = fma(distance, distance, sum);
    }
  }
  sum = sum_over_block(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One warp for each sample. In double: these are a few numbers, and a ratio of densities is the exponential of their
// difference.
template <typename math_t>
__global__ void log_prob_kernel(const math_t* partial, const double* coefficients, math_t* log_prob_B,
                                int64_t blocks_per_sample, int64_t sample_numel) {
  const math_t* row = partial + blockIdx.x * blocks_per_sample;
  double sum = 0;
  for (int64_t block = threadIdx.x; block < blocks_per_sample; block += kWarp) sum += row[block];
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) sum += __shfl_down_sync(0xffffffffu, sum, distance);
  if (threadIdx.x != 0) return;
  const double std = coefficients[3 * blockIdx.x + 2];
  const double log_prob = -sum / static_cast<double>(sample_numel) / (2 * std * std) - log(std) - kHalfLogTwoPi;
  log_prob_B[blockIdx.x] = static_cast<math_t>(std == 0 ? 0 : log_prob);
}

// Either gradient may be null.
template <int kCount, typename math_t, typename velocity_t>
__global__ void __launch_bounds__(kThreads)
    sde_step_backward_kernel(const Operands<math_t, velocity_t> at, const math_t* grad_mean, int64_t grad_mean_stride,
                             const math_t* grad_log_prob_B, velocity_t* grad_velocity) {
  const int64_t b = blockIdx.x / at.blocks_per_sample;
  const int64_t i = ((blockIdx.x % at.blocks_per_sample) * kThreads + threadIdx.x) * kVector;
  if (i >= at.sample_numel) return;
  const int count = static_cast<int>(min(int64_t{kVector}, at.sample_numel - i));
  math_t grad[kVector] = {};
  if (grad_mean != nullptr) load_piece<kCount>(grad_mean + b * grad_mean_stride + i, count, grad);
  if (grad_log_prob_B != nullptr) {
    const math_t std = static_cast<math_t>(at.coefficients[3 * b + 2]);
    const math_t of_distance =
        std == 0 ? math_t{0} : grad_log_prob_B[b] / (static_cast<math_t>(at.sample_numel) * std * std);
    math_t mean[kVector], x_next[kVector];
    load_mean<kCount>(at, b, i, count, mean);
    load_piece<kCount>(at.x_next + b * at.x_next_stride + i, count, x_next);
#pragma unroll
    for (int n = 0; n < kVector; ++n) grad[n] += of_distance * (x_next[n] - mean[n]);
  }
  const math_t of_velocity = static_cast<math_t>(at.coefficients[3 * b + 1]);
#pragma unroll
  for (int n = 0; n < kVector; ++n) grad[n] *= of_velocity;
  store_piece<kCount>(grad_velocity + b * at.sample_numel + i, count, grad);
}

// The arguments of both directions, with contiguous samples.
struct Arguments {
  Tensor x, velocity, coefficients;
  OptionalTensor x_next;

  Arguments(const Tensor& x_B, const Tensor& velocity_B, const Tensor& coefficients_B3, const OptionalTensor& next)
      : x(with_contiguous_from(x_B, 1)),
        velocity(with_contiguous_from(velocity_B, 1)),
        coefficients(torch::stable::contiguous(torch::stable::to(coefficients_B3, ScalarType::Double))) {
    if (next) x_next = with_contiguous_from(*next, 1);
  }

  Grid grid(bool others_aligned) const {
    const int64_t sample_numel = x.numel() / x.size(0);
    return {x.size(0), sample_numel,
            sample_numel % kVector == 0 && others_aligned && is_aligned(x) && is_aligned(velocity) &&
                (!x_next || is_aligned(*x_next))};
  }

  template <typename math_t, typename velocity_t>
  Operands<math_t, velocity_t> operands(const Grid& grid) const {
    return {
        x.const_data_ptr<math_t>(),
        velocity.const_data_ptr<velocity_t>(),
        coefficients.const_data_ptr<double>(),
        x_next ? x_next->const_data_ptr<math_t>() : nullptr,
        x.stride(0),
        velocity.stride(0),
        x_next ? x_next->stride(0) : 0,
        grid.sample_numel,
        grid.in_pieces().blocks_per_sample(),
    };
  }

  // Calls body.operator()<math_t, velocity_t>(): the arithmetic has the dtype of x.
  template <typename Body>
  void dispatch(const Body& body) const {
    dispatch_floating(velocity.scalar_type(), [&]<typename velocity_t>() {
      if (x.scalar_type() == ScalarType::Double)
        body.template operator()<double, velocity_t>();
      else
        body.template operator()<float, velocity_t>();
    });
  }
};

std::tuple<Tensor, Tensor, Tensor> sde_step(const Tensor& x, const Tensor& velocity, const Tensor& coefficients_B3,
                                            const OptionalTensor& noise, const OptionalTensor& streams,
                                            const OptionalTensor& group_B, const OptionalTensor& x_next,
                                            bool with_mean) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const auto like_x = [&] { return torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device()); };
  const Tensor drawn = x_next ? empty(x, {0}) : like_x(), mean = with_mean ? like_x() : empty(x, {0});
  const Tensor log_prob_B = empty(x, {x.size(0)});
  if (x.size(0) == 0) return {drawn, mean, log_prob_B};
  const Arguments given(x, velocity, coefficients_B3, x_next);
  std::optional<NoiseTensors> noises;
  if (!x_next) noises.emplace(noise, streams, *group_B);
  const Grid grid = given.grid(!noises || noises->can_vectorise()), layout = grid.in_pieces();
  const Tensor partial = empty(x, {grid.num_samples, layout.blocks_per_sample()});
  const cudaStream_t stream = current_stream(x);
  given.dispatch([&]<typename math_t, typename velocity_t>() {
    math_t* sums = partial.mutable_data_ptr<math_t>();
    const auto at = given.operands<math_t, velocity_t>(grid);
    const auto source = noises ? noises->operands<math_t>() : GroupNoise<math_t>{};
    if (grid.sample_numel > 0)
      dispatch_grid(grid, noises && noises->is_drawn(), [&]<int kCount, bool kDrawn>() {
        sde_step_kernel<kCount, kDrawn><<<layout.blocks(), kThreads, 0, stream>>>(
            at, source, drawn.mutable_data_ptr<math_t>(), with_mean ? mean.mutable_data_ptr<math_t>() : nullptr, sums);
      });
    log_prob_kernel<<<static_cast<unsigned>(grid.num_samples), kWarp, 0, stream>>>(
        sums, at.coefficients, log_prob_B.mutable_data_ptr<math_t>(), at.blocks_per_sample, at.sample_numel);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {drawn, mean, log_prob_B};
}

Tensor sde_step_backward(const OptionalTensor& grad_mean, const OptionalTensor& grad_log_prob_B, const Tensor& x,
                         const Tensor& velocity, const Tensor& coefficients_B3, const Tensor& x_next) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor grad_velocity =
      torch::stable::empty(velocity.sizes(), velocity.scalar_type(), std::nullopt, velocity.device());
  if (x.numel() == 0) return grad_velocity;
  const Arguments given(x, velocity, coefficients_B3, x_next);
  const Tensor of_mean = grad_mean ? with_contiguous_from(*grad_mean, 1) : given.x;
  const Tensor of_log_prob = grad_log_prob_B ? torch::stable::contiguous(*grad_log_prob_B) : given.x;
  const Grid grid = given.grid(is_aligned(of_mean)), layout = grid.in_pieces();
  const cudaStream_t stream = current_stream(x);
  given.dispatch([&]<typename math_t, typename velocity_t>() {
    const auto at = given.operands<math_t, velocity_t>(grid);
    const math_t* means = grad_mean ? of_mean.const_data_ptr<math_t>() : nullptr;
    const math_t* log_probs = grad_log_prob_B ? of_log_prob.const_data_ptr<math_t>() : nullptr;
    velocity_t* out = grad_velocity.mutable_data_ptr<velocity_t>();
    if (grid.vectorised)
      sde_step_backward_kernel<kVector>
          <<<layout.blocks(), kThreads, 0, stream>>>(at, means, of_mean.stride(0), log_probs, out);
    else
      sde_step_backward_kernel<1>
          <<<layout.blocks(), kThreads, 0, stream>>>(at, means, of_mean.stride(0), log_probs, out);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return grad_velocity;
}

}  // namespace
}  // namespace dgpo_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(dgpo_fast_cuda, CUDA, m) {
  m.impl("sde_step", TORCH_BOX(&dgpo_fast::cuda::sde_step));
  m.impl("sde_step_backward", TORCH_BOX(&dgpo_fast::cuda::sde_step_backward));
}
