#pragma once

#include <cstdint>
#include <optional>

#include <torch/csrc/stable/ops.h>

#include "launch.h"
#include "normal.h"
#include "philox.h"

namespace dgpo_fast::cuda {

// Noise of groups of samples: numbers [G, N], or, where they are null, the four words [G, 4] of each group's stream.
template <typename sample_t>
struct GroupNoise {
  const sample_t* numbers;
  const int64_t* streams;
  const int64_t* group;
  int64_t stride, num_groups;

  // The group of a sample, or -1: to raise for one that does not exist would wait for the device.
  __device__ __forceinline__ int64_t group_of(int64_t sample) const {
    const int64_t g = group[sample];
    return 0 <= g && g < num_groups ? g : -1;
  }

  // Elements i .. i + kCount - 1 of group `g`; where kCount is not 1, it and i are multiples of 4.
  template <bool kDrawn, int kCount, typename math_t>
  __device__ __forceinline__ void load_elements(int64_t g, int64_t i, math_t (&eps)[kCount]) const {
    if constexpr (!kDrawn) {
      load<kCount>(numbers + g * stride + i, eps);
    } else {
      const int64_t* words = streams + 4 * g;
      const StreamName name{static_cast<uint32_t>(words[0]), static_cast<uint32_t>(words[1]),
                            static_cast<uint32_t>(words[2]), static_cast<uint32_t>(words[3])};
      if constexpr (kCount == 1) {
        const Words block = philox_block(name, i / 4);
        const bool second = i % 4 >= 2;
        const NormalPair pair = box_muller(second ? block.w2 : block.w0, second ? block.w3 : block.w1);
        eps[0] = i % 2 ? pair.second : pair.first;
      } else {
#pragma unroll
        for (int n = 0; n < kCount; n += 4) {
          const Words block = philox_block(name, (i + n) / 4);
          const NormalPair one = box_muller(block.w0, block.w1), two = box_muller(block.w2, block.w3);
          eps[n] = one.first, eps[n + 1] = one.second, eps[n + 2] = two.first, eps[n + 3] = two.second;
        }
      }
    }
  }

  // Elements i .. i + kVector - 1 of group `g`, as `load_piece` reads them; i is a multiple of 4. Drawn they need no
  // alignment: a Philox block gives four.
  template <bool kDrawn, int kCount, typename math_t>
  __device__ __forceinline__ void load_piece_of(int64_t g, int64_t i, int count, math_t (&eps)[kVector]) const {
    if constexpr (!kDrawn) {
      load_piece<kCount>(numbers + g * stride + i, count, eps);
    } else {
      load_elements<true, kVector>(g, i, eps);
      if constexpr (kCount != kVector) {
#pragma unroll
        for (int n = 0; n < kVector; ++n) eps[n] = n < count ? eps[n] : math_t{0};
      }
    }
  }
};

// The tensors of a GroupNoise, kept alive for as long as a kernel is being launched.
struct NoiseTensors {
  std::optional<Tensor> numbers, streams;
  Tensor group;

  NoiseTensors(const std::optional<Tensor>& noise, const std::optional<Tensor>& words, const Tensor& groups)
      : group(dense(groups)) {
    if (noise)
      numbers = with_contiguous_from(*noise, 1);
    else
      streams = dense(*words);
  }

  bool is_drawn() const { return !numbers.has_value(); }
  bool can_vectorise() const { return is_drawn() || is_aligned(*numbers); }

  template <typename sample_t>
  GroupNoise<sample_t> operands() const {
    const int64_t* groups = group.const_data_ptr<int64_t>();
    if (is_drawn()) return {nullptr, streams->const_data_ptr<int64_t>(), groups, 0, streams->size(0)};
    return {numbers->const_data_ptr<sample_t>(), nullptr, groups, numbers->stride(0), numbers->size(0)};
  }
};

// Which elements a thread works on, and how a batch of samples is laid over blocks: no block has two samples.
struct Grid {
  int64_t num_samples, sample_numel;
  bool vectorised;

  int count() const { return vectorised ? kVector : 1; }
  int64_t blocks_per_sample() const { return (sample_numel + kThreads * count() - 1) / (kThreads * count()); }
  dim3 blocks() const { return dim3(static_cast<unsigned>(num_samples * blocks_per_sample())); }
  // The same batch over threads that work on kVector elements each, however they read them.
  Grid in_pieces() const { return {num_samples, sample_numel, true}; }
};

// Calls body.operator()<kCount, kDrawn>() with a grid's properties as template arguments.
template <typename Body>
void dispatch_grid(const Grid& grid, bool drawn, const Body& body) {
  if (grid.vectorised && drawn) return body.template operator()<kVector, true>();
  if (grid.vectorised) return body.template operator()<kVector, false>();
  if (drawn) return body.template operator()<1, true>();
  body.template operator()<1, false>();
}

}  // namespace dgpo_fast::cuda
