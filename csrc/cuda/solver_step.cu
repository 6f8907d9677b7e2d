// One solver step on CUDA. Schema, equation, checks and reference: dgpo_fast/ops/solver_step.py.

#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "dispatch.h"
#include "launch.h"

namespace dgpo_fast::cuda {
namespace {

constexpr int kMaxStates = 4;

template <typename state_t, typename velocity_t>
struct Operands {
  const state_t* state;        // [K, B, N]
  const velocity_t* v_cond;    // [B, N]
  const velocity_t* v_uncond;  // [B, N], not read without guidance
  const double* table;         // [E, K, K + 2]
  const int64_t* row_B;
  state_t* new_state;  // [K, B, N], may be `state`
  int64_t state_stride_k, state_stride_b, cond_stride_b, uncond_stride_b, row_stride, new_stride_k, new_stride_b;
  int64_t num_rows, sample_numel, blocks_per_sample;
};

// Everything that a thread reads of the state it reads before it writes, so that the update may run in place.
template <int K, bool kGuided, int kCount, typename state_t, typename velocity_t>
__global__ void __launch_bounds__(kThreads) solver_step_kernel(const Operands<state_t, velocity_t> at) {
  const int64_t b = blockIdx.x / at.blocks_per_sample;
  const int64_t i = ((blockIdx.x % at.blocks_per_sample) * kThreads + threadIdx.x) * kCount;
  if (i >= at.sample_numel) return;
  constexpr int kInputs = K + 1 + kGuided;
  state_t inputs[kInputs][kCount];
#pragma unroll
  for (int k = 0; k < K; ++k)
    load<kCount>(at.state + k * at.state_stride_k + b * at.state_stride_b + i, inputs[k]);
  load<kCount>(at.v_cond + b * at.cond_stride_b + i, inputs[K]);
  if constexpr (kGuided) load<kCount>(at.v_uncond + b * at.uncond_stride_b + i, inputs[K + 1]);

  const int64_t row = at.row_B[b * at.row_stride];
  const bool in_table = 0 <= row && row < at.num_rows;
  const double* coefficients = at.table + (in_table ? row : 0) * (K * (K + 2));
#pragma unroll
  for (int k = 0; k < K; ++k) {
    state_t sum[kCount] = {};
#pragma unroll
    for (int j = 0; j < kInputs; ++j) {
      const state_t c = in_table ? static_cast<state_t>(coefficients[k * (K + 2) + j]) : static_cast<state_t>(NAN);
#pragma unroll
      for (int n = 0; n < kCount; ++n) sum[n] += c * inputs[j][n];
    }
    store<kCount>(at.new_state + k * at.new_stride_k + b * at.new_stride_b + i, sum);
  }
}

template <int K, bool kGuided, typename state_t, typename velocity_t>
void launch(Operands<state_t, velocity_t> at, int64_t num_samples, bool vectorised, cudaStream_t stream) {
  const int count = vectorised ? kVector : 1;
  at.blocks_per_sample = (at.sample_numel + kThreads * count - 1) / (kThreads * count);
  const dim3 grid(static_cast<unsigned>(num_samples * at.blocks_per_sample));
  if (vectorised)
    solver_step_kernel<K, kGuided, kVector><<<grid, kThreads, 0, stream>>>(at);
  else
    solver_step_kernel<K, kGuided, 1><<<grid, kThreads, 0, stream>>>(at);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <int K, typename state_t, typename velocity_t>
void launch(const Operands<state_t, velocity_t>& at, bool guided, int64_t num_samples, bool vectorised,
            cudaStream_t stream) {
  if (guided)
    launch<K, true>(at, num_samples, vectorised, stream);
  else
    launch<K, false>(at, num_samples, vectorised, stream);
}

// Writes the new state into `new_state_KBN`, which is fresh, or is `state_KBN` itself.
void advance_into(const Tensor& new_state_KBN, const Tensor& state_KBN, const Tensor& v_cond,
                  const std::optional<Tensor>& v_uncond, const Tensor& table, const Tensor& row_B) {
  if (state_KBN.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(state_KBN.get_device_index());
  const Tensor cond = with_contiguous_from(v_cond, 1);
  const Tensor uncond = v_uncond ? with_contiguous_from(*v_uncond, 1) : cond;
  const Tensor coefficients = dense(torch::stable::to(table, ScalarType::Double));
  const int64_t num_states = state_KBN.size(0), num_samples = state_KBN.size(1);
  const int64_t sample_numel = cond.numel() / num_samples;
  const bool vectorised = sample_numel % kVector == 0 && is_aligned(state_KBN, 2) && is_aligned(new_state_KBN, 2) &&
                          is_aligned(cond) && is_aligned(uncond);
  const auto run = [&]<typename state_t, typename velocity_t>() {
    const Operands<state_t, velocity_t> at{
        state_KBN.const_data_ptr<state_t>(),
        cond.const_data_ptr<velocity_t>(),
        uncond.const_data_ptr<velocity_t>(),
        coefficients.const_data_ptr<double>(),
        row_B.const_data_ptr<int64_t>(),
        new_state_KBN.mutable_data_ptr<state_t>(),
        state_KBN.stride(0),
        state_KBN.stride(1),
        cond.stride(0),
        uncond.stride(0),
        row_B.stride(0),
        new_state_KBN.stride(0),
        new_state_KBN.stride(1),
        table.size(0),
        sample_numel,
        0,
    };
    const cudaStream_t stream = current_stream(state_KBN);
    const bool guided = v_uncond.has_value();
    switch (num_states) {
      case 1: return launch<1>(at, guided, num_samples, vectorised, stream);
      case 2: return launch<2>(at, guided, num_samples, vectorised, stream);
      case 3: return launch<3>(at, guided, num_samples, vectorised, stream);
      default: return launch<kMaxStates>(at, guided, num_samples, vectorised, stream);
    }
  };
  dispatch_floating(cond.scalar_type(), [&]<typename velocity_t>() {
    if (state_KBN.scalar_type() == ScalarType::Double)
      run.template operator()<double, velocity_t>();
    else
      run.template operator()<float, velocity_t>();
  });
}

Tensor solver_step(const Tensor& state_KBN, const Tensor& v_cond, const std::optional<Tensor>& v_uncond,
                   const Tensor& table, const Tensor& row_B) {
  const Tensor state = with_contiguous_from(state_KBN, 2);
  const Tensor new_state = torch::stable::empty(state.sizes(), state.scalar_type(), std::nullopt, state.device());
  advance_into(new_state, state, v_cond, v_uncond, table, row_B);
  return new_state;
}

void solver_step_(Tensor& state_KBN, const Tensor& v_cond, const std::optional<Tensor>& v_uncond, const Tensor& table,
                  const Tensor& row_B) {
  if (is_contiguous_from(state_KBN, 2))
    advance_into(state_KBN, state_KBN, v_cond, v_uncond, table, row_B);
  else
    torch::stable::copy_(state_KBN, solver_step(state_KBN, v_cond, v_uncond, table, row_B));
}

}  // namespace
}  // namespace dgpo_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(dgpo_fast_cuda, CUDA, m) {
  m.impl("solver_step", TORCH_BOX(&dgpo_fast::cuda::solver_step));
  m.impl("solver_step_", TORCH_BOX(&dgpo_fast::cuda::solver_step_));
}
