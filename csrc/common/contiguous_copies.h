#pragma once

#include <utility>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "arguments.h"

namespace dgpo_fast {

// Contiguous stand-ins for those of some tensors that are not contiguous.
class ContiguousCopies {
 public:
  void* memory_of(const Tensor& tensor) {
    if (tensor.is_contiguous()) return tensor.data_ptr();
    return copies_.emplace_back(tensor, torch::stable::contiguous(tensor)).second.data_ptr();
  }

  void write_back() {
    for (auto& [tensor, copy] : copies_) torch::stable::copy_(tensor, copy);
  }

 private:
  std::vector<std::pair<Tensor, Tensor>> copies_;
};

}  // namespace dgpo_fast
