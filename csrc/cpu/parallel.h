#pragma once

#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

#include "dispatch.h"

namespace dgpo_fast::cpu {

// Elements a thread should have at least: what torch gives the threads of its own elementwise loops.
constexpr int64_t kGrainSize = 32768;

// Calls body(b, i, n) for pieces [i, i + n) of samples b that together cover `num_samples` samples of `sample_numel`
// elements, on all threads.
template <typename Body>
void for_each_piece(int64_t num_samples, int64_t sample_numel, const Body& body) {
  torch::stable::parallel_for(0, num_samples * sample_numel, kGrainSize, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t b = begin / sample_numel, i = begin - b * sample_numel;
      const int64_t n = std::min(end - begin, sample_numel - i);
      body(b, i, n);
      begin += n;
    }
  });
}

}  // namespace dgpo_fast::cpu
