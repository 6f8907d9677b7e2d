// One solver step on the CPU. Schema, equation and reference: dgpo_fast/ops/solver_step.py.

#include "solver_step.h"

#include <algorithm>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "parallel.h"

namespace dgpo_fast::cpu {
namespace {

void check_velocity(const Tensor& velocity, const char* name, const Tensor& state) {
  bool same_shape = velocity.dim() == state.dim() - 1;
  for (int64_t d = 0; same_shape && d < velocity.dim(); ++d) same_shape = velocity.size(d) == state.size(d + 1);
  check_argument(same_shape, name, "expected the shape of one state, state_KBN[0]");
  check_floating(velocity, name);
  check_argument(velocity.is_cpu(), name, "expected the device of state_KBN, cpu");
}

void check_rows(const Tensor& row_B, int64_t num_rows) {
  const int64_t* rows = row_B.const_data_ptr<int64_t>();
  const int64_t stride = row_B.stride(0);
  for (int64_t b = 0; b < row_B.size(0); ++b) {
    const int64_t row = rows[b * stride];
    check_argument(0 <= row && row < num_rows, "row_B", "expected rows in 0..", num_rows - 1, ", got ", row);
  }
}

void check_arguments(const Tensor& state_KBN, const Tensor& v_cond, const std::optional<Tensor>& v_uncond,
                     const Tensor& table, const Tensor& row_B) {
  check_argument(state_KBN.dim() >= 2, "state_KBN", "expected [K, B, ...], got ", state_KBN.dim(), " dimensions");
  const int64_t num_states = state_KBN.size(0);
  check_argument(1 <= num_states && num_states <= kMaxStates, "state_KBN", "expected 1 to ", kMaxStates,
                 " states, got ", num_states);
  check_argument(is_one_of(state_KBN, {ScalarType::Float, ScalarType::Double}), "state_KBN",
                 "expected float32 or float64, got ", dtype_name(state_KBN));
  check_velocity(v_cond, "v_cond", state_KBN);
  if (v_uncond) {
    check_velocity(*v_uncond, "v_uncond", state_KBN);
    check_argument(v_uncond->scalar_type() == v_cond.scalar_type(), "v_uncond", "expected the dtype of v_cond, ",
                   dtype_name(v_cond), ", got ",
                   dtype_name(*v_uncond));
  }
  check_argument(table.dim() == 3 && table.size(1) == num_states && table.size(2) == num_states + 2, "table",
                 "expected [E, ", num_states, ", ", num_states + 2, "]");
  check_argument(is_one_of(table, {ScalarType::Float, ScalarType::Double}), "table",
                 "expected float32 or float64, got ", dtype_name(table));
  check_argument(table.is_cpu(), "table", "expected the device of state_KBN, cpu");
  check_argument(row_B.dim() == 1 && row_B.size(0) == state_KBN.size(1), "row_B", "expected [", state_KBN.size(1),
                 "], one row for each sample");
  check_argument(row_B.scalar_type() == ScalarType::Long, "row_B", "expected int64, got ",
                 dtype_name(row_B));
  check_argument(row_B.is_cpu(), "row_B", "expected the device of state_KBN, cpu");
  check_rows(row_B, table.size(0));
}

template <int K, bool kGuided, typename state_t, typename velocity_t>
void advance_batch(const Tensor& state_KBN, const Tensor& v_cond, const Tensor& v_uncond, const Tensor& table,
                   const Tensor& row_B, const Tensor& new_state_KBN) {
  // In the dtype of the arithmetic: a few hundred numbers, converted once a call.
  const std::vector<double> numbers = numbers_of(table);
  const std::vector<state_t> coefficients(numbers.begin(), numbers.end());
  const int64_t* rows = row_B.const_data_ptr<int64_t>();
  const state_t* state = state_KBN.const_data_ptr<state_t>();
  const velocity_t* cond = v_cond.const_data_ptr<velocity_t>();
  const velocity_t* uncond = v_uncond.const_data_ptr<velocity_t>();
  state_t* new_state = new_state_KBN.mutable_data_ptr<state_t>();
  const int64_t row_stride = row_B.stride(0);
  const int64_t state_stride_k = state_KBN.stride(0), state_stride_b = state_KBN.stride(1);
  const int64_t new_stride_k = new_state_KBN.stride(0), new_stride_b = new_state_KBN.stride(1);
  const int64_t cond_stride_b = v_cond.stride(0), uncond_stride_b = v_uncond.stride(0);
  const int64_t sample_numel = v_cond.numel() / std::max<int64_t>(v_cond.size(0), 1);

  for_each_piece(v_cond.size(0), sample_numel, [&](int64_t b, int64_t i, int64_t n) {
    const state_t* state_b[kMaxStates] = {};
    state_t* new_state_b[kMaxStates] = {};
    for (int k = 0; k < K; ++k) {
      state_b[k] = state + k * state_stride_k + b * state_stride_b + i;
      new_state_b[k] = new_state + k * new_stride_k + b * new_stride_b + i;
    }
    advance<K, kGuided>(coefficients.data() + rows[b * row_stride] * K * (K + 2), state_b, cond + b * cond_stride_b + i,
                        uncond + b * uncond_stride_b + i, new_state_b, n);
  });
}

// Each level below turns one run-time property into a template argument of advance_batch.
template <bool kGuided, typename state_t, typename velocity_t, typename... Tensors>
void dispatch_states(int64_t num_states, const Tensors&... tensors) {
  switch (num_states) {
    case 1: return advance_batch<1, kGuided, state_t, velocity_t>(tensors...);
    case 2: return advance_batch<2, kGuided, state_t, velocity_t>(tensors...);
    case 3: return advance_batch<3, kGuided, state_t, velocity_t>(tensors...);
    default: return advance_batch<4, kGuided, state_t, velocity_t>(tensors...);
  }
}

template <bool kGuided, typename state_t, typename... Tensors>
void dispatch_velocity(ScalarType velocity_dtype, int64_t num_states, const Tensors&... tensors) {
  dispatch_floating(velocity_dtype,
                    [&]<typename velocity_t>() { dispatch_states<kGuided, state_t, velocity_t>(num_states, tensors...); });
}

template <bool kGuided, typename... Tensors>
void dispatch(const Tensor& state_KBN, const Tensor& v_cond, const Tensors&... rest) {
  const ScalarType velocity_dtype = v_cond.scalar_type();
  const int64_t num_states = state_KBN.size(0);
  if (state_KBN.scalar_type() == ScalarType::Double)
    dispatch_velocity<kGuided, double>(velocity_dtype, num_states, state_KBN, v_cond, rest...);
  else
    dispatch_velocity<kGuided, float>(velocity_dtype, num_states, state_KBN, v_cond, rest...);
}

// Writes the new state into `new_state_KBN`, which is fresh, or is `state_KBN` itself. All arguments are checked.
void advance_into(const Tensor& new_state_KBN, const Tensor& state_KBN, const Tensor& v_cond,
                  const std::optional<Tensor>& v_uncond, const Tensor& table, const Tensor& row_B) {
  const Tensor cond = with_contiguous_from(v_cond, 1);
  if (v_uncond)
    dispatch<true>(state_KBN, cond, with_contiguous_from(*v_uncond, 1), table, row_B, new_state_KBN);
  else
    dispatch<false>(state_KBN, cond, cond, table, row_B, new_state_KBN);
}

Tensor advanced(const Tensor& state_KBN, const Tensor& v_cond, const std::optional<Tensor>& v_uncond,
                const Tensor& table, const Tensor& row_B) {
  const Tensor state = with_contiguous_from(state_KBN, 2);
  // Not empty_like, which keeps the strides of a permuted state and invents some for an overlapping one.
  const Tensor new_state = torch::stable::empty(state.sizes(), state.scalar_type(), std::nullopt, state.device());
  advance_into(new_state, state, v_cond, v_uncond, table, row_B);
  return new_state;
}

Tensor solver_step(const Tensor& state_KBN, const Tensor& v_cond, const std::optional<Tensor>& v_uncond,
                   const Tensor& table, const Tensor& row_B) {
  check_arguments(state_KBN, v_cond, v_uncond, table, row_B);
  return advanced(state_KBN, v_cond, v_uncond, table, row_B);
}

void solver_step_(Tensor& state_KBN, const Tensor& v_cond, const std::optional<Tensor>& v_uncond, const Tensor& table,
                  const Tensor& row_B) {
  check_arguments(state_KBN, v_cond, v_uncond, table, row_B);
  check_own_memory(state_KBN, "state_KBN");
  if (is_contiguous_from(state_KBN, 2))
    advance_into(state_KBN, state_KBN, v_cond, v_uncond, table, row_B);
  else
    torch::stable::copy_(state_KBN, advanced(state_KBN, v_cond, v_uncond, table, row_B));
}

}  // namespace
}  // namespace dgpo_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(dgpo_fast, CPU, m) {
  m.impl("solver_step", TORCH_BOX(&dgpo_fast::cpu::solver_step));
  m.impl("solver_step_", TORCH_BOX(&dgpo_fast::cpu::solver_step_));
}
