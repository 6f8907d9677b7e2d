// Exponential moving averages on CUDA. Schema, equation, checks and reference: dgpo_fast/ops/ema_lerp.py.

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "contiguous_copies.h"
#include "dispatch.h"
#include "launch.h"

namespace dgpo_fast::cuda {
namespace {

using Tensors = std::vector<Tensor>;

// Enough that a block's search for its tensor costs little beside them. Not timed on a GPU yet.
constexpr int64_t kElementsPerBlock = 4 * kThreads * kVector;

// A launch has 4 KiB of parameters, from CUDA 12.1 on 32, and copies them all: so a size for few tensors, one for many.
constexpr int kFew = 16;
constexpr int kMany = CUDART_VERSION >= 12010 ? 1024 : 128;

// The tensors of a launch travel as its parameters, not in a table in device memory: filling that takes a copy from the
// host, which a CUDA graph would repeat at every replay from host memory that is no longer ours. Parameters it keeps.
template <int kTensors>
struct Table {
  void* average[kTensors];
  const void* value[kTensors];
  int64_t numel[kTensors];
  unsigned first_block[kTensors];
  int num_tensors = 0;
  unsigned num_blocks = 0;

  void add(void* average_memory, const void* value_memory, int64_t elements) {
    average[num_tensors] = average_memory;
    value[num_tensors] = value_memory;
    numel[num_tensors] = elements;
    first_block[num_tensors++] = num_blocks;
    num_blocks += static_cast<unsigned>((elements + kElementsPerBlock - 1) / kElementsPerBlock);
  }
};

// The tensor of this block, by bisection.
template <int kTensors>
__device__ __forceinline__ int tensor_of_block(const Table<kTensors>& table) {
  int low = 0, high = table.num_tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_block[middle] <= blockIdx.x)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// From the nearer end, as torch.lerp: the value itself at weight 1, the average itself at 0.
template <int kCount, typename average_t, typename value_t>
__device__ __forceinline__ void advance(average_t* averages, const value_t* values, average_t weight) {
  average_t average[kCount], value[kCount];
  load<kCount>(averages, average);
  load<kCount>(values, value);
#pragma unroll
  for (int n = 0; n < kCount; ++n)
    average[n] = weight < average_t{0.5} ? average[n] + weight * (value[n] - average[n])
                                         : value[n] + (weight - 1) * (value[n] - average[n]);
  store<kCount>(averages, average);
}

template <int kTensors, typename average_t, typename value_t>
__global__ void __launch_bounds__(kThreads)
    ema_lerp_kernel(const __grid_constant__ Table<kTensors> table, average_t weight) {
  const int t = tensor_of_block(table);
  average_t* averages = static_cast<average_t*>(table.average[t]);
  const value_t* values = static_cast<const value_t*>(table.value[t]);
  const int64_t numel = table.numel[t];
  const bool aligned = (reinterpret_cast<uintptr_t>(averages) | reinterpret_cast<uintptr_t>(values)) % 16 == 0;
  const int64_t begin = (blockIdx.x - table.first_block[t]) * kElementsPerBlock;
  const int64_t end = min(begin + kElementsPerBlock, numel);
  const int64_t whole = aligned ? end - (end - begin) % kVector : begin;
#pragma unroll 1
  for (int64_t i = begin + threadIdx.x * kVector; i < whole; i += kThreads * kVector)
    advance<kVector>(averages + i, values + i, weight);
#pragma unroll 1
  for (int64_t i = whole + threadIdx.x; i < end; i += kThreads) advance<1>(averages + i, values + i, weight);
}

struct Pair {
  void* average;
  const void* value;
  int64_t numel;
};

template <int kTensors, typename average_t, typename value_t>
void launch(const std::vector<Pair>& pairs, double weight, cudaStream_t stream) {
  for (size_t first = 0; first < pairs.size(); first += kTensors) {
    Table<kTensors> table;
    for (size_t i = first; i < std::min(first + kTensors, pairs.size()); ++i)
      table.add(pairs[i].average, pairs[i].value, pairs[i].numel);
    ema_lerp_kernel<kTensors, average_t, value_t>
        <<<table.num_blocks, kThreads, 0, stream>>>(table, static_cast<average_t>(weight));
  }
}

void ema_lerp_(const Tensors& averages, const Tensors& values, double decay) {
  if (averages.empty()) return;
  const torch::stable::accelerator::DeviceGuard guard(averages[0].get_device_index());
  ContiguousCopies average_copies, value_copies;
  std::vector<Pair> pairs;
  pairs.reserve(averages.size());
  for (size_t i = 0; i < averages.size(); ++i)
    if (const int64_t numel = averages[i].numel(); numel > 0)
      pairs.push_back({average_copies.memory_of(averages[i]), value_copies.memory_of(values[i]), numel});
  const cudaStream_t stream = current_stream(averages[0]);
  const auto run = [&]<typename average_t, typename value_t>() {
    if (pairs.size() <= kFew)
      launch<kFew, average_t, value_t>(pairs, 1 - decay, stream);
    else
      launch<kMany, average_t, value_t>(pairs, 1 - decay, stream);
  };
  dispatch_floating(values[0].scalar_type(), [&]<typename value_t>() {
    if (averages[0].scalar_type() == ScalarType::Double)
      run.template operator()<double, value_t>();
    else
      run.template operator()<float, value_t>();
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  average_copies.write_back();
}

}  // namespace
}  // namespace dgpo_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(dgpo_fast_cuda, CUDA, m) { m.impl("ema_lerp_", TORCH_BOX(&dgpo_fast::cuda::ema_lerp_)); }
