#pragma once

#include <cmath>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "host_device.h"

namespace dgpo_fast {

// The samples of a micro-batch and their groups: [M], [M], [M], [M] and [G].
template <typename number_t>
struct Groups {
  const number_t *error, *reference_error, *advantage;
  const int64_t* group;
  const number_t* size;
  int64_t num_samples, num_groups;
};

// The same as tensors, each a block of memory.
struct DenseGroups {
  Tensor error, reference_error, advantage, group, size;

  DenseGroups(const Tensor& error_M, const Tensor& reference_error_M, const Tensor& advantage_M, const Tensor& group_M,
              const Tensor& size_G)
      : error(dense(error_M)),
        reference_error(dense(reference_error_M)),
        advantage(dense(advantage_M)),
        group(dense(group_M)),
        size(dense(size_G)) {}

  template <typename number_t>
  Groups<number_t> pointers() const {
    return {
        error.const_data_ptr<number_t>(),
        reference_error.const_data_ptr<number_t>(),
        advantage.const_data_ptr<number_t>(),
        group.const_data_ptr<int64_t>(),
        size.const_data_ptr<number_t>(),
        error.size(0),
        size.size(0),
    };
  }
};

DGPO_FAST_HOST_DEVICE double softplus(double s) { return fmax(s, 0.0) + log1p(exp(-fabs(s))); }

DGPO_FAST_HOST_DEVICE double sigmoid(double s) {
  const double z = exp(-fabs(s));
  return (s >= 0 ? 1.0 : z) / (1.0 + z);
}

}  // namespace dgpo_fast
