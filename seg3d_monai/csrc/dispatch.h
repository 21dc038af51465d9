// The dtype of a tensor as a C++ type, on every device.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace seg3d {

// Call function(zero of the dtype); `what` names the tensor in the error for any other dtype.
template <typename Function>
void dispatch_floating(torch::headeronly::ScalarType dtype, const char* what, Function function) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Double:
      return function(double{});
    case ScalarType::Float:
      return function(float{});
    case ScalarType::BFloat16:
      return function(c10::BFloat16{});
    case ScalarType::Half:
      return function(c10::Half{});
    default:
      STD_TORCH_CHECK(false, what, " must be float64, float32, bfloat16 or float16");
  }
}

}  // namespace seg3d
