#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace dgpo_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws std::invalid_argument, which Python sees as ValueError, naming the argument, unless `ok`.
template <typename... Parts>
void check_argument(bool ok, const char* name, const Parts&... expected_and_got) {
  if (ok) return;
  std::ostringstream message;
  message << name << ": ";
  (message << ... << expected_and_got);
  throw std::invalid_argument(message.str());
}

inline const char* dtype_name(const Tensor& tensor) { return torch::headeronly::toString(tensor.scalar_type()); }

inline bool is_one_of(const Tensor& tensor, std::initializer_list<ScalarType> dtypes) {
  return std::find(dtypes.begin(), dtypes.end(), tensor.scalar_type()) != dtypes.end();
}

inline bool is_floating(const Tensor& tensor) {
  return is_one_of(tensor, {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half});
}

inline void check_floating(const Tensor& tensor, const char* name) {
  check_argument(is_floating(tensor), name, "expected a floating-point dtype, got ", dtype_name(tensor));
}

// One number for each sample of `samples`, on the CPU.
inline void check_per_sample(const Tensor& tensor, const char* name, const Tensor& samples) {
  check_argument(tensor.dim() == 1 && tensor.size(0) == samples.size(0), name, "expected [", samples.size(0),
                 "], one number for each sample");
  check_argument(tensor.is_cpu(), name, "expected the device of the samples, cpu");
}

// Whether the dimensions after the first are those of `samples`.
inline bool has_samples_like(const Tensor& tensor, const Tensor& samples) {
  bool same = tensor.dim() == samples.dim();
  for (int64_t d = 1; same && d < tensor.dim(); ++d) same = tensor.size(d) == samples.size(d);
  return same;
}

// True where the elements of dimensions `first` and later lie in memory as one contiguous block.
inline bool is_contiguous_from(const Tensor& tensor, int64_t first) {
  int64_t expected = 1;
  for (int64_t d = tensor.dim() - 1; d >= first; --d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

inline Tensor with_contiguous_from(const Tensor& tensor, int64_t first) {
  return is_contiguous_from(tensor, first) ? tensor : torch::stable::contiguous(tensor);
}

// As one block of memory. Asked here first: the call to the dispatcher that finds nothing to do costs a microsecond.
inline Tensor dense(const Tensor& tensor) { return with_contiguous_from(tensor, 0); }

// Each element has memory of its own, so that it can be written.
inline void check_own_memory(const Tensor& tensor, const char* name) {
  if (tensor.numel() == 0) return;
  std::vector<std::pair<int64_t, int64_t>> steps;  // strides and sizes, the fastest dimension first
  for (int64_t d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) > 1) steps.emplace_back(tensor.stride(d), tensor.size(d));
  std::sort(steps.begin(), steps.end());
  int64_t behind = 1;  // the first stride that steps over all elements of the faster dimensions
  for (const auto& [stride, size] : steps) {
    check_argument(stride >= behind, name,
                   "its elements share memory (an expanded tensor?), so it cannot be updated in place");
    behind = stride * size;
  }
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  const std::vector<int64_t> shape(sizes);
  return torch::stable::empty(shape, like.scalar_type(), std::nullopt, like.device());
}

// The elements of a small CPU tensor of any strides, whose dtype is T.
template <typename T>
std::vector<T> values_of(const Tensor& tensor) {
  const Tensor block = dense(tensor);
  const T* first = block.const_data_ptr<T>();
  return std::vector<T>(first, first + block.numel());
}

// The elements of a small CPU tensor of float32 or float64.
inline std::vector<double> numbers_of(const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::Double) return values_of<double>(tensor);
  const std::vector<float> values = values_of<float>(tensor);
  return std::vector<double>(values.begin(), values.end());
}

// The noise of groups of samples, on the CPU: given, or drawn from streams, and the group of each sample.
inline void check_noise(const Tensor& samples, const std::optional<Tensor>& noise, const std::optional<Tensor>& streams,
                        const Tensor& group, const char* group_name) {
  check_per_sample(group, group_name, samples);
  check_argument(is_one_of(group, {ScalarType::Long}), group_name, "expected int64, got ", dtype_name(group));
  check_argument(noise.has_value() != streams.has_value(), "noise", "expected either noise or streams");
  if (noise) {
    check_argument(noise->scalar_type() == samples.scalar_type(), "noise", "expected the dtype of the samples, ",
                   dtype_name(samples), ", got ", dtype_name(*noise));
    check_argument(has_samples_like(*noise, samples), "noise", "expected the shape of the samples");
    check_argument(noise->is_cpu(), "noise", "expected the device of the samples, cpu");
  } else {
    check_argument(is_one_of(*streams, {ScalarType::Long}), "streams", "expected int64, got ", dtype_name(*streams));
    check_argument(streams->dim() == 2 && streams->size(1) == 4, "streams", "expected four words for each group");
    check_argument(streams->is_cpu(), "streams", "expected the device of the samples, cpu");
    for (int64_t word : values_of<int64_t>(*streams))
      check_argument(0 <= word && word < (int64_t{1} << 32), "streams", "expected values in 0..2^32-1, got ", word);
  }
  const int64_t num_groups = noise ? noise->size(0) : streams->size(0);
  check_argument(num_groups > 0 || samples.size(0) == 0, noise ? "noise" : "streams", "expected a group or more for ",
                 samples.size(0), " samples");
  for (int64_t g : values_of<int64_t>(group))
    check_argument(0 <= g && g < num_groups, group_name, "expected values in 0..", num_groups - 1, ", got ", g);
}

}  // namespace dgpo_fast
