#pragma once

#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "arguments.h"

namespace dgpo_fast {

// What a kernel computes in for tensors of `stored_t`.
template <typename stored_t>
using arithmetic_t = std::conditional_t<std::is_same_v<stored_t, double>, double, float>;

// Calls `body.operator()<T>()` with the C++ type of a floating-point dtype that has been checked.
template <typename Body>
void dispatch_floating(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Double: return body.template operator()<double>();
    case ScalarType::BFloat16: return body.template operator()<torch::headeronly::BFloat16>();
    case ScalarType::Half: return body.template operator()<torch::headeronly::Half>();
    default: return body.template operator()<float>();
  }
}

// The same with the C++ type of float32 or float64.
template <typename Body>
void dispatch_number(ScalarType dtype, const Body& body) {
  if (dtype == ScalarType::Double)
    body.template operator()<double>();
  else
    body.template operator()<float>();
}

}  // namespace dgpo_fast
