#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "draw_normals.h"
#include "parallel.h"

namespace dgpo_fast::cpu {

// Noise of groups of samples, given or drawn where it is used.
class GroupNoise {
 public:
  // Elements of a sample that are worked on at once: their noise stays in the first-level cache.
  static constexpr int64_t kChunk = 2048;

  GroupNoise(const std::optional<Tensor>& noise, const std::optional<Tensor>& streams, const Tensor& group)
      : words_(streams ? values_of<int64_t>(*streams) : std::vector<int64_t>{}) {
    if (noise) given_ = with_contiguous_from(*noise, 1);
    for (int64_t g : values_of<int64_t>(group)) {
      if (runs_.empty() || runs_.back().group != g) runs_.push_back({num_samples_, num_samples_, g});
      runs_.back().last = ++num_samples_;
    }
  }

  // Calls body(b, first, n, noise) for pieces [first, first + n) of samples b that together cover them, on all threads.
  // Neighbouring samples of one group share what has been drawn. `noise` points to n numbers: sample_t where they are
  // given, float where they are drawn.
  template <typename sample_t, typename Body>
  void for_each_piece(int64_t sample_numel, const Body& body) const {
    const sample_t* given = given_ ? given_->template const_data_ptr<sample_t>() : nullptr;
    const int64_t given_stride = given_ ? given_->stride(0) : 0;
    const int64_t chunks = num_chunks(sample_numel), tasks = static_cast<int64_t>(runs_.size()) * chunks;
    const int64_t elements_per_task = tasks > 0 ? num_samples_ * sample_numel / tasks : 1;
    const int64_t grain = std::max<int64_t>(1, kGrainSize / std::max<int64_t>(1, elements_per_task));
    torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      float drawn[kChunk];
      for (int64_t task = begin; task < end; ++task) {
        const Run& run = runs_[task / chunks];
        const int64_t first = task % chunks * kChunk, n = std::min(kChunk, sample_numel - first);
        if (given == nullptr) draw_normals(stream_name(&words_[4 * run.group]), first, drawn, n);
        for (int64_t b = run.first; b < run.last; ++b)
          if (given == nullptr)
            body(b, first, n, static_cast<const float*>(drawn));
          else
            body(b, first, n, given + run.group * given_stride + first);
      }
    });
  }

  static int64_t num_chunks(int64_t sample_numel) { return (sample_numel + kChunk - 1) / kChunk; }

 private:
  // Neighbouring samples of one group.
  struct Run {
    int64_t first, last, group;
  };

  std::vector<int64_t> words_;
  std::optional<Tensor> given_;
  std::vector<Run> runs_;
  int64_t num_samples_ = 0;
};

}  // namespace dgpo_fast::cpu
