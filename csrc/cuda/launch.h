#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "arguments.h"

namespace dgpo_fast::cuda {

// Elements a thread works on: two 16-byte accesses of float32, one of a 16-bit type.
constexpr int kVector = 8;
// Chosen from the machine code; not timed on a GPU yet.
constexpr int kThreads = 128;

// The stream that torch launches on, for the device of `tensor`; a torch::stable::accelerator::DeviceGuard must hold.
inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Whether every sample of `tensor`, whose samples are contiguous, begins at a multiple of 16 bytes.
inline bool is_aligned(const Tensor& tensor, int64_t first_sample_dim = 1) {
  const int64_t element = tensor.element_size();
  bool aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d < first_sample_dim; ++d)
    aligned = aligned && (tensor.size(d) <= 1 || tensor.stride(d) * element % 16 == 0);
  return aligned;
}

// Reads kCount neighbouring elements, 16 bytes at a time where there are several.
template <int kCount, typename math_t, typename stored_t>
__device__ __forceinline__ void load(const stored_t* from, math_t (&values)[kCount]) {
  if constexpr (kCount == 1) {
    values[0] = static_cast<math_t>(*from);
  } else {
    constexpr int kPerAccess = 16 / sizeof(stored_t);
#pragma unroll
    for (int first = 0; first < kCount; first += kPerAccess) {
      alignas(16) stored_t piece[kPerAccess];
      *reinterpret_cast<uint4*>(piece) = *reinterpret_cast<const uint4*>(from + first);
#pragma unroll
      for (int i = 0; i < kPerAccess; ++i) values[first + i] = static_cast<math_t>(piece[i]);
    }
  }
}

template <int kCount, typename math_t, typename stored_t>
__device__ __forceinline__ void store(stored_t* to, const math_t (&values)[kCount]) {
  if constexpr (kCount == 1) {
    *to = static_cast<stored_t>(values[0]);
  } else {
    constexpr int kPerAccess = 16 / sizeof(stored_t);
#pragma unroll
    for (int first = 0; first < kCount; first += kPerAccess) {
      stored_t piece[kPerAccess];
#pragma unroll
      for (int i = 0; i < kPerAccess; ++i) piece[i] = static_cast<stored_t>(values[first + i]);
      // Written out: a plain store of float16 was seen to leave in pieces of four bytes (nvcc 13.0, sm_80).
      uint32_t words[4];
      memcpy(words, piece, sizeof(words));
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to + first)),
                   "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                   : "memory");
    }
  }
}

// A thread of a kernel with sums works on kVector neighbouring elements of a sample, however it reads them: 16 bytes at
// a time where kCount is kVector, else the `count` that there are one by one, with zeros for the rest. So the sums have
// one order, wherever the tensors lie.
template <int kCount, typename math_t, typename stored_t>
__device__ __forceinline__ void load_piece(const stored_t* from, int count, math_t (&values)[kVector]) {
  if constexpr (kCount == kVector) {
    load<kVector>(from, values);
  } else {
#pragma unroll
    for (int n = 0; n < kVector; ++n) values[n] = n < count ? static_cast<math_t>(from[n]) : math_t{0};
  }
}

template <int kCount, typename math_t, typename stored_t>
__device__ __forceinline__ void store_piece(stored_t* to, int count, const math_t (&values)[kVector]) {
  if constexpr (kCount == kVector) {
    store<kVector>(to, values);
  } else {
#pragma unroll
    for (int n = 0; n < kVector; ++n)
      if (n < count) to[n] = static_cast<stored_t>(values[n]);
  }
}

}  // namespace dgpo_fast::cuda
