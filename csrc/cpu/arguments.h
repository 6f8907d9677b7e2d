#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>

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

// True where the elements of dimensions `first` and later lie in memory as one contiguous block.
inline bool is_contiguous_from(const Tensor& tensor, int64_t first) {
  int64_t expected = 1;
  for (int64_t d = tensor.dim() - 1; d >= first; --d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

}  // namespace dgpo_fast
