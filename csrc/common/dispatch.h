#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "arguments.h"

namespace dgpo_fast {

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

}  // namespace dgpo_fast
