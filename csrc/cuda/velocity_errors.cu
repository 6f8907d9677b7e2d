// Denoising errors on CUDA. Schema, equations, checks and reference: dgpo_fast/ops/velocity_errors.py.

#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "dispatch.h"
#include "launch.h"
#include "noise.h"
#include "warp.h"

namespace dgpo_fast::cuda {
namespace {

using OptionalTensor = std::optional<Tensor>;

enum VelocityError { kPolicy, kOld, kReference, kDistance, kNumErrors };

template <typename math_t, typename velocity_t>
struct Operands {
  const velocity_t* velocity;       // [M, N]
  const velocity_t* old;            // [M, N], or null
  const velocity_t* reference;      // [M, N], or null
  const velocity_t* unconditional;  // [M, N], or null
  const math_t* x0;                 // [M, N]
  GroupNoise<math_t> noise;
  int64_t velocity_stride, old_stride, reference_stride, unconditional_stride, x0_stride;
  math_t guidance;
  int64_t num_samples, sample_numel, blocks_per_sample;
};

// v*, and NaN for a sample of a group that does not exist.
template <int kCount, bool kDrawn, typename math_t, typename velocity_t>
__device__ __forceinline__ void load_target(const Operands<math_t, velocity_t>& at, int64_t m, int64_t i, int count,
                                            math_t (&target)[kVector]) {
  const int64_t group = at.noise.group_of(m);
  math_t x0[kVector];
  load_piece<kCount>(at.x0 + m * at.x0_stride + i, count, x0);
  at.noise.template load_piece_of<kDrawn, kCount>(group < 0 ? 0 : group, i, count, target);
#pragma unroll
  for (int n = 0; n < kVector; ++n) target[n] = group < 0 ? static_cast<math_t>(NAN) : target[n] - x0[n];
}

// The reference's velocity, guided where there is an unconditional one.
template <int kCount, typename math_t, typename velocity_t>
__device__ __forceinline__ void load_guided(const Operands<math_t, velocity_t>& at, int64_t m, int64_t i, int count,
                                            math_t (&guided)[kVector]) {
  load_piece<kCount>(at.reference + m * at.reference_stride + i, count, guided);
  if (at.unconditional == nullptr) return;
  math_t unconditional[kVector];
  load_piece<kCount>(at.unconditional + m * at.unconditional_stride + i, count, unconditional);
#pragma unroll
  for (int n = 0; n < kVector; ++n) guided[n] = fma(at.guidance, guided[n] - unconditional[n], unconditional[n]);
}

// Elements behind the end of a sample are zeros in both, and add nothing. Explicitly fused, to be the same bits in
// every kernel.
template <typename math_t>
__device__ __forceinline__ math_t sum_of_squares(const math_t (&a)[kVector], const math_t (&b)[kVector]) {
  math_t sum = 0;
#pragma unroll
  for (int n = 0; n < kVector; ++n) sum = fma(a[n] - b[n], a[n] - b[n], sum);
  return sum;
}

// The sums of a block's elements to partial[row, m, block], in an order that is always the same.
template <int kCount, bool kDrawn, typename math_t, typename velocity_t>
__global__ void __launch_bounds__(kThreads)
    velocity_errors_kernel(const Operands<math_t, velocity_t> at, math_t* partial) {
  const int64_t m = blockIdx.x / at.blocks_per_sample, block = blockIdx.x % at.blocks_per_sample;
  const int64_t i = (block * kThreads + threadIdx.x) * kVector;
  math_t sums[kNumErrors] = {};
  if (i < at.sample_numel) {
    const int count = static_cast<int>(min(int64_t{kVector}, at.sample_numel - i));
    math_t target[kVector], policy[kVector];
    load_target<kCount, kDrawn>(at, m, i, count, target);
    load_piece<kCount>(at.velocity + m * at.velocity_stride + i, count, policy);
    sums[kPolicy] = sum_of_squares(policy, target);
    if (at.old != nullptr) {
      math_t old[kVector];
      load_piece<kCount>(at.old + m * at.old_stride + i, count, old);
      sums[kOld] = sum_of_squares(old, target);
    }
    if (at.reference != nullptr) {
      math_t guided[kVector];
      load_guided<kCount>(at, m, i, count, guided);
      sums[kReference] = sum_of_squares(guided, target);
      sums[kDistance] = sum_of_squares(policy, guided);
    }
  }
  __shared__ math_t of_warp[kNumErrors][kThreads / kWarp];
#pragma unroll
  for (int row = 0; row < kNumErrors; ++row) {
    sums[row] = sum_over_warp(sums[row]);
    if (threadIdx.x % kWarp == 0) of_warp[row][threadIdx.x / kWarp] = sums[row];
  }
  __syncthreads();
  if (threadIdx.x >= kNumErrors) return;
  math_t sum = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / kWarp; ++warp) sum += of_warp[threadIdx.x][warp];
  partial[(threadIdx.x * at.num_samples + m) * at.blocks_per_sample + block] = sum;
}

// Named, since an array of arguments that is indexed at run time would be copied to local memory.
template <typename math_t>
struct Errors {
  math_t *policy, *old, *reference, *distance;  // [M] each, or null

  __device__ __forceinline__ math_t* of(int64_t row) const {
    return row == kPolicy ? policy : row == kOld ? old : row == kReference ? reference : distance;
  }
};

// One warp for each number of the results: the mean over a sample's blocks.
template <typename math_t>
__global__ void mean_over_blocks(const math_t* partial, const Errors<math_t> errors, int64_t num_samples,
                                 int64_t blocks_per_sample, int64_t sample_numel) {
  math_t* error = errors.of(blockIdx.x / num_samples);
  if (error == nullptr) return;
  const math_t* row = partial + blockIdx.x * blocks_per_sample;
  math_t sum = 0;
  for (int64_t block = threadIdx.x; block < blocks_per_sample; block += kWarp) sum += row[block];
  sum = sum_over_warp(sum);
  if (threadIdx.x == 0) error[blockIdx.x % num_samples] = sum / static_cast<math_t>(sample_numel);
}

template <int kCount, bool kDrawn, typename math_t, typename velocity_t>
__global__ void __launch_bounds__(kThreads)
    velocity_errors_backward_kernel(const Operands<math_t, velocity_t> at, const math_t* grad_policy,
                                    const math_t* grad_distance, velocity_t* grad_velocity) {
  const int64_t m = blockIdx.x / at.blocks_per_sample;
  const int64_t i = ((blockIdx.x % at.blocks_per_sample) * kThreads + threadIdx.x) * kVector;
  if (i >= at.sample_numel) return;
  const int count = static_cast<int>(min(int64_t{kVector}, at.sample_numel - i));
  const math_t scale = static_cast<math_t>(2) / static_cast<math_t>(at.sample_numel);
  math_t target[kVector], policy[kVector], grad[kVector];
  load_target<kCount, kDrawn>(at, m, i, count, target);
  load_piece<kCount>(at.velocity + m * at.velocity_stride + i, count, policy);
  const math_t of_target = scale * grad_policy[m];
#pragma unroll
  for (int n = 0; n < kVector; ++n) grad[n] = of_target * (policy[n] - target[n]);
  if (grad_distance != nullptr) {
    math_t guided[kVector];
    load_guided<kCount>(at, m, i, count, guided);
    const math_t of_reference = scale * grad_distance[m];
#pragma unroll
    for (int n = 0; n < kVector; ++n) grad[n] = fma(of_reference, policy[n] - guided[n], grad[n]);
  }
  store_piece<kCount>(grad_velocity + m * at.sample_numel + i, count, grad);
}

// The arguments of both directions, with contiguous samples.
struct Arguments {
  Tensor velocity, x0;
  OptionalTensor old, reference, unconditional;
  NoiseTensors noises;
  double guidance;

  Grid grid() const {
    const int64_t sample_numel = x0.numel() / x0.size(0);
    bool vectorised = sample_numel % kVector == 0 && noises.can_vectorise() && is_aligned(velocity) && is_aligned(x0);
    for (const OptionalTensor* tensor : {&old, &reference, &unconditional})
      vectorised = vectorised && (!*tensor || is_aligned(**tensor));
    return {x0.size(0), sample_numel, vectorised};
  }

  template <typename math_t, typename velocity_t>
  Operands<math_t, velocity_t> operands(const Grid& grid) const {
    const auto pointer = [](const OptionalTensor& t) { return t ? t->const_data_ptr<velocity_t>() : nullptr; };
    const auto stride = [](const OptionalTensor& t) { return t ? t->stride(0) : 0; };
    return {
        velocity.const_data_ptr<velocity_t>(),
        pointer(old),
        pointer(reference),
        pointer(unconditional),
        x0.const_data_ptr<math_t>(),
        noises.operands<math_t>(),
        velocity.stride(0),
        stride(old),
        stride(reference),
        stride(unconditional),
        x0.stride(0),
        static_cast<math_t>(guidance),
        grid.num_samples,
        grid.sample_numel,
        grid.in_pieces().blocks_per_sample(),
    };
  }

  // Calls body.operator()<math_t, velocity_t>(): the arithmetic has the dtype of x0.
  template <typename Body>
  void dispatch(const Body& body) const {
    dispatch_floating(velocity.scalar_type(), [&]<typename velocity_t>() {
      if (x0.scalar_type() == ScalarType::Double)
        body.template operator()<double, velocity_t>();
      else
        body.template operator()<float, velocity_t>();
    });
  }
};

OptionalTensor with_contiguous_samples(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(with_contiguous_from(*tensor, 1)) : std::nullopt;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> velocity_errors(const Tensor& velocity, const Tensor& x0, const OptionalTensor& noise,
                       const OptionalTensor& streams, const Tensor& group_M, const OptionalTensor& old,
                       const OptionalTensor& reference, const OptionalTensor& unconditional, double guidance) {
  const torch::stable::accelerator::DeviceGuard guard(x0.get_device_index());
  const int64_t num_samples = x0.size(0);
  const bool given_of[kNumErrors] = {true, old.has_value(), reference.has_value(), reference.has_value()};
  const auto room = [&](int row) { return empty(x0, {given_of[row] ? num_samples : 0}); };
  const Tensor errors[kNumErrors] = {room(kPolicy), room(kOld), room(kReference), room(kDistance)};
  const std::tuple<Tensor, Tensor, Tensor, Tensor> result{errors[kPolicy], errors[kOld], errors[kReference],
                                                          errors[kDistance]};
  if (x0.numel() == 0) {
    for (const Tensor& error : errors) torch::stable::fill_(error, NAN);
    return result;
  }
  const Arguments given{
      with_contiguous_from(velocity, 1),
      with_contiguous_from(x0, 1),
      with_contiguous_samples(old),
      with_contiguous_samples(reference),
      with_contiguous_samples(unconditional),
      NoiseTensors(noise, streams, group_M),
      guidance,
  };
  const Grid grid = given.grid(), layout = grid.in_pieces();
  const Tensor partial = empty(x0, {kNumErrors, grid.num_samples, layout.blocks_per_sample()});
  const cudaStream_t stream = current_stream(x0);
  given.dispatch([&]<typename math_t, typename velocity_t>() {
    math_t* sums = partial.mutable_data_ptr<math_t>();
    const Operands<math_t, velocity_t> at = given.operands<math_t, velocity_t>(grid);
    dispatch_grid(grid, given.noises.is_drawn(), [&]<int kCount, bool kDrawn>() {
      velocity_errors_kernel<kCount, kDrawn><<<layout.blocks(), kThreads, 0, stream>>>(at, sums);
    });
    const dim3 rows(static_cast<unsigned>(kNumErrors * grid.num_samples));
    const auto pointer = [&](int row) {
      return given_of[row] ? errors[row].template mutable_data_ptr<math_t>() : nullptr;
    };
    const Errors<math_t> means{pointer(kPolicy), pointer(kOld), pointer(kReference), pointer(kDistance)};
    mean_over_blocks<<<rows, kWarp, 0, stream>>>(sums, means, at.num_samples, at.blocks_per_sample, at.sample_numel);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

Tensor velocity_errors_backward(const Tensor& grad_policy_M, const OptionalTensor& grad_distance_M,
                                const Tensor& velocity, const Tensor& x0, const OptionalTensor& noise,
                                const OptionalTensor& streams, const Tensor& group_M, const OptionalTensor& reference,
                                const OptionalTensor& unconditional, double guidance) {
  const torch::stable::accelerator::DeviceGuard guard(x0.get_device_index());
  const Tensor grad_velocity =
      torch::stable::empty(velocity.sizes(), velocity.scalar_type(), std::nullopt, velocity.device());
  if (x0.numel() == 0) return grad_velocity;
  const Arguments given{
      with_contiguous_from(velocity, 1),
      with_contiguous_from(x0, 1),
      std::nullopt,
      with_contiguous_samples(reference),
      with_contiguous_samples(unconditional),
      NoiseTensors(noise, streams, group_M),
      guidance,
  };
  const Grid grid = given.grid(), layout = grid.in_pieces();
  const Tensor policy_grads = dense(grad_policy_M);
  const OptionalTensor distance_grads = grad_distance_M ? OptionalTensor(dense(*grad_distance_M)) : std::nullopt;
  const cudaStream_t stream = current_stream(x0);
  given.dispatch([&]<typename math_t, typename velocity_t>() {
    const Operands<math_t, velocity_t> at = given.operands<math_t, velocity_t>(grid);
    dispatch_grid(grid, given.noises.is_drawn(), [&]<int kCount, bool kDrawn>() {
      velocity_errors_backward_kernel<kCount, kDrawn><<<layout.blocks(), kThreads, 0, stream>>>(
          at, policy_grads.const_data_ptr<math_t>(),
          distance_grads ? distance_grads->const_data_ptr<math_t>() : nullptr,
          grad_velocity.mutable_data_ptr<velocity_t>());
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return grad_velocity;
}

}  // namespace
}  // namespace dgpo_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(dgpo_fast_cuda, CUDA, m) {
  m.impl("velocity_errors", TORCH_BOX(&dgpo_fast::cuda::velocity_errors));
  m.impl("velocity_errors_backward", TORCH_BOX(&dgpo_fast::cuda::velocity_errors_backward));
}
