// Advantages on CUDA. Schema, equation, checks and reference: dgpo_fast/ops/group_advantages.py.

#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "dispatch.h"
#include "launch.h"
#include "warp.h"

namespace dgpo_fast::cuda {
namespace {

struct Moments {
  double mean, std;
};

// Population moments of the valid ones of `n` rewards, the same in every lane of the warp; equal rewards have a
// deviation of exactly 0 about themselves.
template <typename number_t>
__device__ Moments moments(const number_t* reward, const bool* valid, int64_t n) {
  double sum = 0, count = 0, lowest = INFINITY, highest = -INFINITY;
  for (int64_t i = threadIdx.x; i < n; i += kWarp) {
    if (!valid[i]) continue;
    const double value = static_cast<double>(reward[i]);
    sum += value, count += 1;
    lowest = fmin(lowest, value), highest = fmax(highest, value);
  }
  sum = sum_over_warp(sum), count = sum_over_warp(count);
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    lowest = fmin(lowest, __shfl_xor_sync(kWholeWarp, lowest, distance));
    highest = fmax(highest, __shfl_xor_sync(kWholeWarp, highest, distance));
  }
  if (count == 0 || (lowest == highest && isfinite(sum))) return {highest, 0.0};
  const double mean = sum / count;
  double squares = 0;
  for (int64_t i = threadIdx.x; i < n; i += kWarp)
    if (valid[i]) squares += (static_cast<double>(reward[i]) - mean) * (static_cast<double>(reward[i]) - mean);
  return {mean, sqrt(sum_over_warp(squares) / count)};
}

// One warp for each group. With `global_std` each looks at all rewards: they are few, and a second launch costs more.
template <typename number_t>
__global__ void __launch_bounds__(kWarp)
    group_advantages_kernel(const number_t* reward, const bool* valid, int64_t num_samples, int64_t group_size,
                            bool global_std, double epsilon, double clamp, number_t* advantage, number_t* std,
                            bool* clamped) {
  const int64_t first = blockIdx.x * group_size;
  const Moments of_group = moments(reward + first, valid + first, group_size);
  const double spread = (global_std ? moments(reward, valid, num_samples).std : of_group.std) + epsilon;
  if (threadIdx.x == 0) std[blockIdx.x] = static_cast<number_t>(of_group.std);
  for (int64_t i = first + threadIdx.x; i < first + group_size; i += kWarp) {
    const double raw = valid[i] ? (static_cast<double>(reward[i]) - of_group.mean) / spread : 0.0;
    const double within = isnan(raw) ? raw : fmin(fmax(raw, -clamp), clamp);
    advantage[i] = static_cast<number_t>(within);
    clamped[i] = within != raw;
  }
}

std::tuple<Tensor, Tensor, Tensor> group_advantages(const Tensor& reward_B, const Tensor& valid_B, int64_t group_size,
                                                    bool global_std, double epsilon, double clamp) {
  const torch::stable::accelerator::DeviceGuard guard(reward_B.get_device_index());
  const Tensor rewards = dense(reward_B), truths = dense(valid_B);
  const Tensor advantage_B = torch::stable::empty_like(rewards), clamped_B = torch::stable::empty_like(truths);
  const int64_t num_samples = reward_B.size(0), num_groups = num_samples / group_size;
  const Tensor std_G = empty(rewards, {num_groups});
  if (num_samples == 0) return {advantage_B, std_G, clamped_B};
  const cudaStream_t stream = current_stream(rewards);
  dispatch_number(rewards.scalar_type(), [&]<typename number_t>() {
    group_advantages_kernel<<<static_cast<unsigned>(num_groups), kWarp, 0, stream>>>(
        rewards.const_data_ptr<number_t>(), truths.const_data_ptr<bool>(), num_samples, group_size, global_std, epsilon,
        clamp, advantage_B.mutable_data_ptr<number_t>(), std_G.mutable_data_ptr<number_t>(),
        clamped_B.mutable_data_ptr<bool>());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {advantage_B, std_G, clamped_B};
}

}  // namespace
}  // namespace dgpo_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(dgpo_fast_cuda, CUDA, m) {
  m.impl("group_advantages", TORCH_BOX(&dgpo_fast::cuda::group_advantages));
}
