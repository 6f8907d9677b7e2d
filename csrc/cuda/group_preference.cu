// The group-preference loss on CUDA. Schemas, equations, checks and reference: dgpo_fast/ops/group_preference.py.

#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "dispatch.h"
#include "groups.h"
#include "launch.h"
#include "warp.h"

namespace dgpo_fast::cuda {
namespace {

using OptionalTensor = std::optional<Tensor>;

// s_G of group `g`, the same in every lane.
template <typename number_t>
__device__ double score_of(const Groups<number_t>& at, int64_t g, double beta) {
  double sum = 0;
  for (int64_t m = threadIdx.x; m < at.num_samples; m += kWarp)
    if (at.group[m] == g)
      sum += static_cast<double>(at.advantage[m]) *
             (static_cast<double>(at.error[m]) - static_cast<double>(at.reference_error[m]));
  return beta * sum_over_warp(sum) / static_cast<double>(at.size[g]);
}

template <typename number_t>
__device__ bool has_group(const Groups<number_t>& at, int64_t m) {
  return 0 <= at.group[m] && at.group[m] < at.num_groups;
}

template <typename number_t>
__global__ void __launch_bounds__(kWarp)
    group_scores_kernel(const Groups<number_t> at, double beta, number_t* score_G) {
  const double score = score_of(at, blockIdx.x, beta);
  if (threadIdx.x == 0) score_G[blockIdx.x] = static_cast<number_t>(score);
}

template <typename number_t>
struct Results {
  number_t *objective, *surrogate, *weight;
  bool* clipped;
};

// One warp does it all, sums in double: a micro-batch has tens of samples, and a launch costs more.
template <typename number_t>
__global__ void __launch_bounds__(kWarp)
    group_preference_kernel(const Groups<number_t> at, const number_t* given_score, const number_t* old_error,
                            double beta, double clip, const Results<number_t> out) {
  double objective = 0, surrogate = 0;
  for (int64_t g = 0; g < at.num_groups; ++g) {
    const double score = given_score != nullptr ? static_cast<double>(given_score[g]) : score_of(at, g, beta);
    const double weight = sigmoid(score);
    objective += softplus(score);
    if (threadIdx.x == 0) out.weight[g] = static_cast<number_t>(weight);
    const double share = weight / static_cast<double>(at.size[g]);
    for (int64_t m = threadIdx.x; m < at.num_samples; m += kWarp)
      if (at.group[m] == g) surrogate += share * static_cast<double>(at.advantage[m]) * static_cast<double>(at.error[m]);
  }
  // In the dtype of the errors, as the ratio is exactly 1 there for equal ones.
  const number_t highest = static_cast<number_t>(1 + clip), lowest = static_cast<number_t>(1 - clip);
  bool lost = false;
  for (int64_t m = threadIdx.x; m < at.num_samples; m += kWarp) {
    lost = lost || !has_group(at, m);
    const number_t ratio = old_error != nullptr ? exp(old_error[m] - at.error[m]) : number_t{1};
    out.clipped[m] = old_error != nullptr && (at.advantage[m] > 0 ? ratio > highest : ratio < lowest);
  }
  surrogate = sum_over_warp(surrogate);
  lost = __any_sync(kWholeWarp, lost);
  if (threadIdx.x != 0) return;
  // A group that does not exist: to raise would wait for the device.
  *out.objective = static_cast<number_t>(lost ? NAN : objective / beta);
  *out.surrogate = static_cast<number_t>(lost ? NAN : surrogate);
}

template <typename number_t>
__global__ void __launch_bounds__(kThreads)
    group_preference_backward_kernel(const Groups<number_t> at, const number_t* grad, const number_t* weight,
                                     const bool* clipped, number_t* grad_error) {
  const int64_t m = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (m >= at.num_samples) return;
  const int64_t g = has_group(at, m) ? at.group[m] : -1;
  const number_t share = g < 0 ? static_cast<number_t>(NAN) : weight[g] / at.size[g];
  grad_error[m] = clipped[m] ? number_t{0} : *grad * share * at.advantage[m];
}

OptionalTensor dense_if_given(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(dense(*tensor)) : std::nullopt;
}

template <typename number_t>
const number_t* pointer(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<number_t>() : nullptr;
}

Tensor group_scores(const Tensor& error_M, const Tensor& reference_error_M, const Tensor& advantage_M,
                    const Tensor& group_M, const Tensor& size_G, double beta) {
  const torch::stable::accelerator::DeviceGuard guard(error_M.get_device_index());
  const DenseGroups groups(error_M, reference_error_M, advantage_M, group_M, size_G);
  const Tensor score_G = torch::stable::empty_like(groups.size);
  if (size_G.numel() == 0) return score_G;
  const cudaStream_t stream = current_stream(error_M);
  dispatch_number(error_M.scalar_type(), [&]<typename number_t>() {
    group_scores_kernel<<<static_cast<unsigned>(size_G.numel()), kWarp, 0, stream>>>(
        groups.pointers<number_t>(), beta, score_G.mutable_data_ptr<number_t>());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return score_G;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_preference(const Tensor& error_M, const Tensor& reference_error_M,
                                                            const Tensor& advantage_M, const Tensor& group_M,
                                                            const Tensor& size_G, const OptionalTensor& score_G,
                                                            const OptionalTensor& old_error_M, double beta,
                                                            double clip) {
  const torch::stable::accelerator::DeviceGuard guard(error_M.get_device_index());
  const DenseGroups groups(error_M, reference_error_M, advantage_M, group_M, size_G);
  const OptionalTensor scores = dense_if_given(score_G), old_errors = dense_if_given(old_error_M);
  const Tensor objective = empty(groups.error, {}), surrogate = empty(groups.error, {});
  const Tensor weight_G = torch::stable::empty_like(groups.size);
  const Tensor clipped_M =
      torch::stable::empty(std::vector<int64_t>{error_M.size(0)}, ScalarType::Bool, std::nullopt, error_M.device());
  const cudaStream_t stream = current_stream(error_M);
  dispatch_number(error_M.scalar_type(), [&]<typename number_t>() {
    const Results<number_t> out{objective.mutable_data_ptr<number_t>(), surrogate.mutable_data_ptr<number_t>(),
                                weight_G.mutable_data_ptr<number_t>(), clipped_M.mutable_data_ptr<bool>()};
    group_preference_kernel<<<1, kWarp, 0, stream>>>(groups.pointers<number_t>(), pointer<number_t>(scores),
                                                     pointer<number_t>(old_errors), beta, clip, out);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {objective, surrogate, weight_G, clipped_M};
}

Tensor group_preference_backward(const Tensor& grad, const Tensor& weight_G, const Tensor& advantage_M,
                                 const Tensor& group_M, const Tensor& size_G, const Tensor& clipped_M) {
  const torch::stable::accelerator::DeviceGuard guard(advantage_M.get_device_index());
  const DenseGroups groups(advantage_M, advantage_M, advantage_M, group_M, size_G);
  const Tensor weights = dense(weight_G), clipped = dense(clipped_M);
  const Tensor grad_error_M = torch::stable::empty_like(groups.advantage);
  const int64_t num_samples = advantage_M.numel();
  if (num_samples == 0) return grad_error_M;
  const cudaStream_t stream = current_stream(advantage_M);
  dispatch_number(advantage_M.scalar_type(), [&]<typename number_t>() {
    group_preference_backward_kernel<<<static_cast<unsigned>((num_samples + kThreads - 1) / kThreads), kThreads, 0,
                                       stream>>>(
        groups.pointers<number_t>(), grad.const_data_ptr<number_t>(), weights.const_data_ptr<number_t>(),
        clipped.const_data_ptr<bool>(), grad_error_M.mutable_data_ptr<number_t>());
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return grad_error_M;
}

}  // namespace
}  // namespace dgpo_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(dgpo_fast_cuda, CUDA, m) {
  m.impl("group_scores", TORCH_BOX(&dgpo_fast::cuda::group_scores));
  m.impl("group_preference", TORCH_BOX(&dgpo_fast::cuda::group_preference));
  m.impl("group_preference_backward", TORCH_BOX(&dgpo_fast::cuda::group_preference_backward));
}
