#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "dispatch.h"
#include "multiversion.h"
#include "parallel.h"

namespace dgpo_fast::cpu {

inline void check_tokens(const Tensor& tensor, const char* name) {
  check_argument(tensor.dim() == 3, name, "expected [B, N, D], got ", tensor.dim(), " dimensions");
  check_floating(tensor, name);
}

// `tensor` has the dtype, shape and device of the tokens `like`, the argument `like_name`.
inline void check_alike(const Tensor& tensor, const char* name, const Tensor& like, const char* like_name) {
  check_argument(tensor.scalar_type() == like.scalar_type(), name, "expected the dtype of ", like_name, ", ",
                 dtype_name(like), ", got ", dtype_name(tensor));
  check_argument(tensor.dim() == 3 && tensor.size(0) == like.size(0) && has_samples_like(tensor, like), name,
                 "expected the shape of ", like_name);
  check_argument(tensor.is_cpu(), name, "expected the device of ", like_name, ", cpu");
}

// `tensor` is [B, D] for the tokens `like`, [B, N, D], the argument `like_name`.
inline void check_modulation(const Tensor& tensor, const char* name, const Tensor& like, const char* like_name) {
  check_argument(tensor.scalar_type() == like.scalar_type(), name, "expected the dtype of ", like_name, ", ",
                 dtype_name(like), ", got ", dtype_name(tensor));
  check_argument(tensor.dim() == 2 && tensor.size(0) == like.size(0) && tensor.size(1) == like.size(2), name,
                 "expected [B, D] of ", like_name, ", [", like.size(0), ", ", like.size(2), "]");
  check_argument(tensor.is_cpu(), name, "expected the device of ", like_name, ", cpu");
}

inline void check_eps(double eps) { check_argument(eps > 0, "eps", "expected a positive number, got ", eps); }

// Where the rows of [B, N, D], or the one row for each sample of [B, D], begin.
template <typename scalar_t>
struct Rows {
  const scalar_t* first;
  int64_t stride_b, stride_n;

  const scalar_t* operator()(int64_t b, int64_t n = 0) const { return first + b * stride_b + n * stride_n; }
};

// A tensor whose rows are blocks of memory: itself where they are.
class WithRows {
 public:
  explicit WithRows(const Tensor& tensor) : tensor_(with_contiguous_from(tensor, tensor.dim() - 1)) {}

  template <typename scalar_t>
  Rows<scalar_t> of() const {
    return {tensor_.const_data_ptr<scalar_t>(), tensor_.stride(0), tensor_.dim() == 3 ? tensor_.stride(1) : 0};
  }

 private:
  Tensor tensor_;
};

// Rows of samples, in chunks of neighbours that one thread works on.
class RowChunks {
 public:
  // As few as torch adds up one by one; a constant, so that sums depend on shapes alone, never on the number of threads.
  static constexpr int64_t kRows = 16;

  explicit RowChunks(const Tensor& tokens)
      : num_samples(tokens.size(0)), num_rows(tokens.size(1)), width(tokens.size(2)) {}

  // At least one: a sum over no row is zero.
  int64_t per_sample() const { return std::max<int64_t>(1, (num_rows + kRows - 1) / kRows); }

  // Where row n of sample b begins in a contiguous tensor.
  int64_t offset(int64_t b, int64_t n) const { return (b * num_rows + n) * width; }

  // Calls body(b, chunk, first, last) for rows first..last-1 of sample b, on all threads.
  template <typename Body>
  void for_each(const Body& body) const {
    if (width == 0) return;
    const int64_t chunks = per_sample(), grain = std::max<int64_t>(1, kGrainSize / (kRows * width));
    torch::stable::parallel_for(0, num_samples * chunks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % chunks * kRows;
        body(task / chunks, task % chunks, first, std::min(first + kRows, num_rows));
      }
    });
  }

  const int64_t num_samples, num_rows, width;
};

// `from`, in the dtype of `to`.
template <typename math_t, typename scalar_t>
DGPO_FAST_MULTIVERSION void round_row(const math_t* from, scalar_t* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<scalar_t>(from[i]);
}

// Adds `row` to `sum`.
template <typename math_t, typename scalar_t>
DGPO_FAST_MULTIVERSION void add_row(const scalar_t* row, math_t* sum, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += static_cast<math_t>(row[i]);
}

// A sum over the rows of each sample, [B, D]: first over each chunk, then over the chunks, in a tree.
template <typename math_t>
class RowSums {
 public:
  RowSums(const RowChunks& chunks, bool wanted)
      : chunks_(chunks),
        wanted_(wanted),
        partial_(wanted ? chunks.num_samples * chunks.per_sample() * chunks.width : 0) {}

  // Where the rows of a chunk are added up, from zero on.
  math_t* of(int64_t b, int64_t chunk) { return partial_.data() + (b * chunks_.per_sample() + chunk) * chunks_.width; }

  // The sums in the dtype of `like`, scalar_t; no element where they are not wanted.
  template <typename scalar_t>
  Tensor finish(const Tensor& like) {
    if (!wanted_) return empty(like, {0});
    const int64_t width = chunks_.width;
    const Tensor sums = empty(like, {chunks_.num_samples, width});
    scalar_t* out = sums.mutable_data_ptr<scalar_t>();
    for_each_piece(chunks_.num_samples, width, [&](int64_t b, int64_t i, int64_t n) {
      const int64_t chunks = chunks_.per_sample();
      for (int64_t step = 1; step < chunks; step *= 2)
        for (int64_t chunk = 0; chunk + step < chunks; chunk += 2 * step)
          add_row(of(b, chunk + step) + i, of(b, chunk) + i, n);
      round_row(of(b, 0) + i, out + b * width + i, n);
    });
    return sums;
  }

 private:
  const RowChunks& chunks_;
  const bool wanted_;
  std::vector<math_t> partial_;
};

}  // namespace dgpo_fast::cpu
