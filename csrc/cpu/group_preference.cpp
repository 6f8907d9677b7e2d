// The group-preference loss on the CPU. Schemas, equations and reference: dgpo_fast/ops/group_preference.py.

#include "group_preference.h"

#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "dispatch.h"

namespace dgpo_fast::cpu {
namespace {

using OptionalTensor = std::optional<Tensor>;

void check_numbers(const Tensor& tensor, const char* name, const Tensor& like, const Tensor& error,
                   const char* each_of) {
  check_argument(tensor.scalar_type() == error.scalar_type(), name, "expected ", dtype_name(error), ", got ",
                 dtype_name(tensor));
  check_argument(tensor.dim() == 1 && tensor.size(0) == like.size(0), name, "expected [", like.size(0),
                 "], one number for each ", each_of);
  check_argument(tensor.is_cpu(), name, "expected the device of the errors, cpu");
}

void check_groups(const Tensor& error, const char* error_name, const Tensor& group_M, const Tensor& size_G) {
  check_argument(error.dim() == 1, error_name, "expected [M]");
  check_argument(is_one_of(error, {ScalarType::Float, ScalarType::Double}), error_name,
                 "expected float32 or float64, got ", dtype_name(error));
  check_argument(is_one_of(group_M, {ScalarType::Long}), "group_M", "expected int64, got ", dtype_name(group_M));
  check_per_sample(group_M, "group_M", error);
  check_argument(size_G.dim() == 1, "size_G", "expected [G]");
  check_numbers(size_G, "size_G", size_G, error, "group");
  for (int64_t g : values_of<int64_t>(group_M))
    check_argument(0 <= g && g < size_G.size(0), "group_M", "expected values in 0..", size_G.size(0) - 1, ", got ", g);
}

Tensor group_scores(const Tensor& error_M, const Tensor& reference_error_M, const Tensor& advantage_M,
                    const Tensor& group_M, const Tensor& size_G, double beta) {
  check_groups(error_M, "error_M", group_M, size_G);
  check_numbers(reference_error_M, "reference_error_M", error_M, error_M, "sample");
  check_numbers(advantage_M, "advantage_M", error_M, error_M, "sample");
  check_argument(beta > 0, "beta", "expected a positive number, got ", beta);
  const DenseGroups groups(error_M, reference_error_M, advantage_M, group_M, size_G);
  const Tensor score_G = torch::stable::empty_like(groups.size);
  dispatch_number(error_M.scalar_type(), [&]<typename number_t>() {
    const std::vector<double> scores = scores_of(groups.pointers<number_t>(), beta);
    std::copy(scores.begin(), scores.end(), score_G.mutable_data_ptr<number_t>());
  });
  return score_G;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_preference(const Tensor& error_M, const Tensor& reference_error_M,
                                                            const Tensor& advantage_M, const Tensor& group_M,
                                                            const Tensor& size_G, const OptionalTensor& score_G,
                                                            const OptionalTensor& old_error_M, double beta,
                                                            double clip) {
  check_groups(error_M, "error_M", group_M, size_G);
  check_numbers(reference_error_M, "reference_error_M", error_M, error_M, "sample");
  check_numbers(advantage_M, "advantage_M", error_M, error_M, "sample");
  check_argument(beta > 0, "beta", "expected a positive number, got ", beta);
  check_argument(clip >= 0, "clip", "expected a number that is not negative, got ", clip);
  if (score_G) check_numbers(*score_G, "score_G", size_G, error_M, "group");
  if (old_error_M) check_numbers(*old_error_M, "old_error_M", error_M, error_M, "sample");
  const DenseGroups groups(error_M, reference_error_M, advantage_M, group_M, size_G);
  const Tensor old_error = old_error_M ? dense(*old_error_M) : groups.error;
  const Tensor objective = empty(groups.error, {}), surrogate = empty(groups.error, {});
  const Tensor weight_G = torch::stable::empty_like(groups.size);
  const Tensor clipped_M =
      torch::stable::empty(std::vector<int64_t>{error_M.size(0)}, ScalarType::Bool, std::nullopt, error_M.device());
  dispatch_number(error_M.scalar_type(), [&]<typename number_t>() {
    const Groups<number_t> at = groups.pointers<number_t>();
    const std::vector<double> scores = score_G ? numbers_of(*score_G) : scores_of(at, beta);
    number_t* weights = weight_G.mutable_data_ptr<number_t>();
    double softplus_sum = 0, surrogate_sum = 0;
    for (int64_t g = 0; g < at.num_groups; ++g) {
      weights[g] = static_cast<number_t>(sigmoid(scores[g]));
      softplus_sum += softplus(scores[g]);
    }
    bool* clipped = clipped_M.mutable_data_ptr<bool>();
    const number_t* old = old_error.const_data_ptr<number_t>();
    for (int64_t m = 0; m < at.num_samples; ++m) {
      const int64_t g = at.group[m];
      surrogate_sum += static_cast<double>(weights[g]) / static_cast<double>(at.size[g]) *
                       static_cast<double>(at.advantage[m]) * static_cast<double>(at.error[m]);
      clipped[m] = old_error_M && is_clipped(at.error[m], old[m], at.advantage[m], clip);
    }
    *objective.mutable_data_ptr<number_t>() = static_cast<number_t>(softplus_sum / beta);
    *surrogate.mutable_data_ptr<number_t>() = static_cast<number_t>(surrogate_sum);
  });
  return {objective, surrogate, weight_G, clipped_M};
}

Tensor group_preference_backward(const Tensor& grad, const Tensor& weight_G, const Tensor& advantage_M,
                                 const Tensor& group_M, const Tensor& size_G, const Tensor& clipped_M) {
  check_groups(advantage_M, "advantage_M", group_M, size_G);
  check_argument(grad.dim() == 0 && grad.scalar_type() == advantage_M.scalar_type() && grad.is_cpu(), "grad",
                 "expected a scalar of the dtype and device of advantage_M");
  check_numbers(weight_G, "weight_G", size_G, advantage_M, "group");
  check_argument(is_one_of(clipped_M, {ScalarType::Bool}), "clipped_M", "expected bool, got ", dtype_name(clipped_M));
  check_per_sample(clipped_M, "clipped_M", advantage_M);
  const DenseGroups groups(advantage_M, advantage_M, advantage_M, group_M, size_G);
  const Tensor weights = dense(weight_G), clipped = dense(clipped_M);
  const Tensor grad_error_M = torch::stable::empty_like(groups.advantage);
  dispatch_number(advantage_M.scalar_type(), [&]<typename number_t>() {
    const Groups<number_t> at = groups.pointers<number_t>();
    const number_t incoming = *grad.const_data_ptr<number_t>(), *weight = weights.const_data_ptr<number_t>();
    const bool* held = clipped.const_data_ptr<bool>();
    number_t* out = grad_error_M.mutable_data_ptr<number_t>();
    for (int64_t m = 0; m < at.num_samples; ++m) {
      const int64_t g = at.group[m];
      out[m] = held[m] ? number_t{0} : incoming * (weight[g] / at.size[g]) * at.advantage[m];
    }
  });
  return grad_error_M;
}

}  // namespace
}  // namespace dgpo_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(dgpo_fast, CPU, m) {
  m.impl("group_scores", TORCH_BOX(&dgpo_fast::cpu::group_scores));
  m.impl("group_preference", TORCH_BOX(&dgpo_fast::cpu::group_preference));
  m.impl("group_preference_backward", TORCH_BOX(&dgpo_fast::cpu::group_preference_backward));
}
