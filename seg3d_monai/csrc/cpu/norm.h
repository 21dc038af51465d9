// What the norms on the CPU share: pairs of vectors up to the end of a row, the ReLU, checks of weight and bias.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/lanes.h"

namespace seg3d {

// Two vectors of channels that are all there.
template <typename acc_t>
struct WholePair {
  template <typename scalar_t>
  void load(const scalar_t* source, Vec<acc_t>& first, Vec<acc_t>& second) const {
    load_pair<acc_t>(source, first, second);
  }
  template <typename scalar_t>
  void store(scalar_t* target, Vec<acc_t> first, Vec<acc_t> second) const {
    store_pair<acc_t>(target, first, second);
  }
  void clear_rest(Vec<acc_t>&, Vec<acc_t>&) const {}
};

// Two vectors at a row's end, in the order of the channels: `count` lanes are channels, and the others load as zero.
template <typename acc_t>
struct PartOfPair {
  static constexpr int64_t lanes = num_lanes<acc_t>;
  using Mask = typename VecOf<acc_t>::index;

  explicit PartOfPair(int64_t count) : in_first(std::min(count, lanes)), in_second(count - in_first) {
    for (int64_t i = 0; i < lanes; ++i) {
      first_mask[i] = i < in_first ? -1 : 0;
      second_mask[i] = i < in_second ? -1 : 0;
    }
  }
  template <typename scalar_t>
  void load(const scalar_t* source, Vec<acc_t>& first, Vec<acc_t>& second) const {
    first = load_some_lanes<acc_t>(source, in_first);
    second = load_some_lanes<acc_t>(source + in_first, in_second);
  }
  template <typename scalar_t>
  void store(scalar_t* target, Vec<acc_t> first, Vec<acc_t> second) const {
    store_some_lanes<acc_t>(target, first, in_first);
    store_some_lanes<acc_t>(target + in_first, second, in_second);
  }
  void clear_rest(Vec<acc_t>& first, Vec<acc_t>& second) const {
    first = (Vec<acc_t>)((Mask)first & first_mask);
    second = (Vec<acc_t>)((Mask)second & second_mask);
  }

  int64_t in_first, in_second;
  Mask first_mask, second_mask;
};

// The sum over the lanes: halves are added, then quarters.
template <typename acc_t>
inline acc_t sum_of_lanes(Vec<acc_t> lanes) {
  for (int64_t half = num_lanes<acc_t> / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) {
      lanes[i] += lanes[i + half];
    }
  }
  return lanes[0];
}

// The largest number that rounds to zero in the storage type.
template <typename scalar_t>
constexpr accumulate_t<scalar_t> largest_zero() {
  if constexpr (std::is_same_v<scalar_t, c10::Half>) {
    return 0x1p-25f;
  } else if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
    return 0x1p-134f;
  } else {
    return 0;
  }
}

// x, and 0 where `y` <= limit; a NaN in y keeps x.
template <typename acc_t>
inline Vec<acc_t> keep_above(Vec<acc_t> x, Vec<acc_t> y, acc_t limit) {
  using Mask = typename VecOf<acc_t>::index;
  return (Vec<acc_t>)((Mask)x & ~(Mask)(y <= limit));
}

// Raise unless weight and bias are [C] and fit x.
inline void check_affine(const char* op, const torch::stable::Tensor& x, int64_t channels,
                         const torch::stable::Tensor& weight, const torch::stable::Tensor& bias) {
  using torch::headeronly::ScalarType;
  for (const torch::stable::Tensor* vector : {&weight, &bias}) {
    STD_TORCH_CHECK(vector->dim() == 1 && vector->size(0) == channels, op,
                    ": weight and bias must have the shape [C] with C = ", channels, " of x");
    STD_TORCH_CHECK(vector->scalar_type() == x.scalar_type() ||
                        (vector->scalar_type() == ScalarType::Float && x.scalar_type() != ScalarType::Double),
                    op, ": weight and bias must have the dtype of x, or be float32 where x is a half type");
    STD_TORCH_CHECK(vector->is_cpu(), op, ": all tensors must be on the same device");
  }
  STD_TORCH_CHECK(x.is_cpu(), op, ": all tensors must be on the same device");
  STD_TORCH_CHECK(weight.scalar_type() == bias.scalar_type(), op, ": weight and bias must have one dtype");
}

// Raise unless grad is like x.
inline void check_grad(const char* op, const torch::stable::Tensor& grad, const torch::stable::Tensor& x) {
  bool fits = grad.dim() == x.dim() && grad.scalar_type() == x.scalar_type() && grad.is_cpu();
  for (int64_t axis = 0; fits && axis < x.dim(); ++axis) {
    fits = grad.size(axis) == x.size(axis);
  }
  STD_TORCH_CHECK(fits, op, "_backward: grad must have the dtype, the shape and the device of x");
}

}  // namespace seg3d
