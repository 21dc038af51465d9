// LayerNorm over the last axis on the CPU, forward and backward, with a ReLU behind it where that is wanted.
//
// Rows are worked off in tiles of as many rows as a vector has lanes. A tile stays in the first-level cache and is read
// once for each of its sums: the means, then the variances of the centred values, then, on the way back, the two sums
// that the gradient needs. The partial sums of all rows of a tile are added across lanes together, so that lane i holds
// what belongs to row i, and roots and quotients are taken once a tile. Nothing but the result is written: the backward
// pass computes the moments again, which costs less than to store and read them.
//
// float32 and float64 rows are shifted by their first value before anything is summed, which keeps the moments of rows
// far from zero as good as those of rows near it, and those of constant rows exact. Sums of half types are exact enough
// in float32 as they are.
//
// Gradients of weight and bias are summed over chunks of rows whose bounds depend on nothing but the shape, then over
// the chunks in their order: the same bits for any number of threads. Cost: memory traffic, up to some 256 channels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/lanes.h"
#include "cpu/norm.h"
#include "dispatch.h"

namespace seg3d {
namespace {

using torch::stable::Tensor;

// How many numbers a thread should get at least, and how many numbers, or tiles, a chunk of rows holds.
constexpr int64_t kLeastWork = 32768, kLeastTiles = 4;

// How the channels of a row lie in pairs of vectors. With `fixed_pairs` > 0 there are so many, all of them whole.
template <typename scalar, int64_t fixed_pairs>
class Row {
 public:
  using scalar_t = scalar;
  using acc_t = accumulate_t<scalar_t>;
  static constexpr int64_t lanes = num_lanes<acc_t>, width = 2 * lanes;

  explicit Row(int64_t channels) : channels_(channels), rest_(channels % width) {}

  int64_t channels() const {
    if constexpr (fixed_pairs > 0) {
      return fixed_pairs * width;
    }
    return channels_;
  }
  // The length of a row of sums.
  int64_t padded() const { return (channels() + width - 1) / width * width; }

  // The place of a channel in a row of sums: whole pairs of bfloat16 give the even channels, then the odd ones.
  int64_t place(int64_t channel) const {
    const int64_t offset = channel % width;
    if (std::is_same_v<scalar_t, c10::BFloat16> && channel < channels_ / width * width) {
      return channel - offset + offset / 2 + offset % 2 * lanes;
    }
    return channel;
  }

  // Call visit(first channel, WholePair or PartOfPair) from the first to the last.
  template <typename Visit>
  void for_each_pair(Visit visit) const {
    for (int64_t begin = 0; begin + width <= channels(); begin += width) {
      visit(begin, WholePair<acc_t>{});
    }
    if (fixed_pairs == 0 && channels_ % width > 0) {
      visit(channels_ / width * width, rest_);
    }
  }

 private:
  int64_t channels_;
  PartOfPair<acc_t> rest_;
};

// Weight and bias in the order of a row's vectors, zero where there is no channel.
template <typename acc_t>
struct Affine {
  Vec<acc_t> scale(int64_t begin, int64_t half, Vec<acc_t> x) const {
    const int64_t at = begin + half * num_lanes<acc_t>;
    return x * load_lanes<acc_t>(weight + at) + load_lanes<acc_t>(bias + at);
  }

  const acc_t *weight, *bias;
};

// What belongs to the rows of a tile, row i at place i.
template <typename acc_t>
struct Tile {
  alignas(64) acc_t shift[num_lanes<acc_t>], mean[num_lanes<acc_t>], rstd[num_lanes<acc_t>];

  template <typename scalar_t>
  static constexpr bool is_shifted = std::is_same_v<scalar_t, acc_t>;

  template <typename scalar_t>
  Vec<acc_t> centred(Vec<acc_t> x, int64_t i) const {
    if constexpr (is_shifted<scalar_t>) {
      x -= shift[i];
    }
    return x - mean[i];
  }
  template <typename scalar_t>
  Vec<acc_t> normed(Vec<acc_t> x, int64_t i) const {
    return centred<scalar_t>(x, i) * rstd[i];
  }

  // Moments of `count` <= num_lanes rows.
  template <typename Row>
  void find_moments(const typename Row::scalar_t* x, int64_t count, const Row& row, acc_t eps) {
    using scalar_t = typename Row::scalar_t;
    const acc_t channels = static_cast<acc_t>(row.channels());
    Vec<acc_t> sums[num_lanes<acc_t>] = {};
    for (int64_t i = 0; i < count; ++i) {
      const scalar_t* values = x + i * row.channels();
      shift[i] = static_cast<acc_t>(values[0]);
      row.for_each_pair([&](int64_t begin, const auto& pair) {
        Vec<acc_t> first, second;
        pair.load(values + begin, first, second);
        if constexpr (is_shifted<scalar_t>) {
          first -= shift[i];
          second -= shift[i];
          pair.clear_rest(first, second);
        }
        sums[i] += first + second;
      });
    }
    store_lanes<acc_t>(mean, sums_of_rows<acc_t>(sums) / channels);
    for (int64_t i = 0; i < num_lanes<acc_t>; ++i) {
      sums[i] = Vec<acc_t>{};
    }
    for (int64_t i = 0; i < count; ++i) {
      const scalar_t* values = x + i * row.channels();
      row.for_each_pair([&](int64_t begin, const auto& pair) {
        Vec<acc_t> first, second;
        pair.load(values + begin, first, second);
        first = centred<scalar_t>(first, i);
        second = centred<scalar_t>(second, i);
        pair.clear_rest(first, second);
        sums[i] += first * first + second * second;
      });
    }
    const Vec<acc_t> variance = sums_of_rows<acc_t>(sums) / channels;
    for (int64_t i = 0; i < num_lanes<acc_t>; ++i) {
      rstd[i] = 1 / std::sqrt(variance[i] + eps);
    }
  }
};

// A vector [C] in the order of a row's vectors, padded with zeros.
template <typename Row>
void arrange(const Tensor& vector, const Row& row, typename Row::acc_t* target) {
  std::fill(target, target + row.padded(), typename Row::acc_t(0));
  dispatch_floating(vector.scalar_type(), "layer_norm: weight", [&](auto zero) {
    const auto* values = vector.const_data_ptr<decltype(zero)>();
    for (int64_t c = 0; c < row.channels(); ++c) {
      target[row.place(c)] = static_cast<typename Row::acc_t>(values[c]);
    }
  });
}

template <typename Row>
class ArrangedAffine : public Affine<typename Row::acc_t> {
 public:
  ArrangedAffine(const Tensor& weight, const Tensor& bias, const Row& row) {
    auto* const values = buffer_.reserve(2 * row.padded());
    arrange(weight, row, values);
    arrange(bias, row, values + row.padded());
    this->weight = values;
    this->bias = values + row.padded();
  }

 private:
  AlignedBuffer<typename Row::acc_t> buffer_;
};

template <bool relu, typename Row>
void forward(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, const Row& row, Tensor& output) {
  using scalar_t = typename Row::scalar_t;
  using acc_t = typename Row::acc_t;
  constexpr int64_t lanes = Row::lanes;
  const ArrangedAffine<Row> affine(weight, bias, row);
  const scalar_t* const values = x.const_data_ptr<scalar_t>();
  scalar_t* const results = output.mutable_data_ptr<scalar_t>();
  const int64_t channels = row.channels(), num_rows = x.numel() / channels;
  const int64_t grain = std::max<int64_t>(1, kLeastWork / (channels * lanes));
  torch::stable::parallel_for(0, (num_rows + lanes - 1) / lanes, grain, [&](int64_t begin, int64_t end) {
    Tile<acc_t> tile;
    for (int64_t first_row = begin * lanes; first_row < std::min(end * lanes, num_rows); first_row += lanes) {
      const int64_t count = std::min(lanes, num_rows - first_row), start = first_row * channels;
      tile.find_moments(values + start, count, row, static_cast<acc_t>(eps));
      row.for_each_pair([&](int64_t channel, const auto& pair) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t at = start + i * channels + channel;
          Vec<acc_t> first, second;
          pair.load(values + at, first, second);
          first = affine.scale(channel, 0, tile.template normed<scalar_t>(first, i));
          second = affine.scale(channel, 1, tile.template normed<scalar_t>(second, i));
          if constexpr (relu) {
            first = keep_above<acc_t>(first, first, 0);
            second = keep_above<acc_t>(second, second, 0);
          }
          pair.store(results + at, first, second);
        }
      });
    }
  });
}

// The gradients of one tile of rows; those of weight and bias are added to rows of sums.
template <bool relu, typename Row>
class TileGradient {
 public:
  using scalar_t = typename Row::scalar_t;
  using acc_t = typename Row::acc_t;

  TileGradient(const Row& row, const Affine<acc_t>& affine, acc_t eps) : row_(row), affine_(affine), eps_(eps) {}

  void operator()(const scalar_t* grad, const scalar_t* x, int64_t count, scalar_t* grad_x, acc_t* grad_weight,
                  acc_t* grad_bias) {
    tile_.find_moments(x, count, row_, eps_);
    find_slopes(grad, x, count);
    row_.for_each_pair([&](int64_t channel, const auto& pair) {
      Vec<acc_t> of_weight[2], of_bias[2];
      for (int half = 0; half < 2; ++half) {
        of_weight[half] = load_lanes<acc_t>(grad_weight + channel + half * Row::lanes);
        of_bias[half] = load_lanes<acc_t>(grad_bias + channel + half * Row::lanes);
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = i * row_.channels() + channel;
        Vec<acc_t> normed[2], grads[2];
        load(grad + at, x + at, channel, i, pair, normed, grads);
        for (int half = 0; half < 2; ++half) {
          of_weight[half] += grads[half] * normed[half];
          of_bias[half] += grads[half];
          const Vec<acc_t> weight = load_lanes<acc_t>(affine_.weight + channel + half * Row::lanes);
          grads[half] = (grads[half] * weight - offset_[i] - normed[half] * slope_[i]) * tile_.rstd[i];
        }
        pair.store(grad_x + at, grads[0], grads[1]);
      }
      for (int half = 0; half < 2; ++half) {
        store_lanes<acc_t>(grad_weight + channel + half * Row::lanes, of_weight[half]);
        store_lanes<acc_t>(grad_bias + channel + half * Row::lanes, of_bias[half]);
      }
    });
  }

 private:
  // Normed values of a pair, and the gradients that pass the ReLU.
  template <typename Pair>
  void load(const scalar_t* grad, const scalar_t* x, int64_t channel, int64_t i, const Pair& pair,
            Vec<acc_t> (&normed)[2], Vec<acc_t> (&grads)[2]) const {
    pair.load(x, normed[0], normed[1]);
    pair.load(grad, grads[0], grads[1]);
    for (int half = 0; half < 2; ++half) {
      normed[half] = tile_.template normed<scalar_t>(normed[half], i);
      if constexpr (relu) {
        const Vec<acc_t> result = affine_.scale(channel, half, normed[half]);
        grads[half] = keep_above<acc_t>(grads[half], result, largest_zero<scalar_t>());
      }
    }
  }

  // Per row the means over its channels of grad * weight, and of the same times the normed values.
  void find_slopes(const scalar_t* grad, const scalar_t* x, int64_t count) {
    Vec<acc_t> offsets[Row::lanes] = {}, slopes[Row::lanes] = {};
    for (int64_t i = 0; i < count; ++i) {
      row_.for_each_pair([&](int64_t channel, const auto& pair) {
        const int64_t at = i * row_.channels() + channel;
        Vec<acc_t> normed[2], grads[2];
        load(grad + at, x + at, channel, i, pair, normed, grads);
        for (int half = 0; half < 2; ++half) {
          grads[half] *= load_lanes<acc_t>(affine_.weight + channel + half * Row::lanes);
          offsets[i] += grads[half];
          slopes[i] += grads[half] * normed[half];
        }
      });
    }
    const acc_t channels = static_cast<acc_t>(row_.channels());
    store_lanes<acc_t>(offset_, sums_of_rows<acc_t>(offsets) / channels);
    store_lanes<acc_t>(slope_, sums_of_rows<acc_t>(slopes) / channels);
  }

  const Row& row_;
  const Affine<acc_t>& affine_;
  acc_t eps_;
  Tile<acc_t> tile_;
  alignas(64) acc_t offset_[Row::lanes], slope_[Row::lanes];
};

// Add the chunks' rows of sums, in their order, up to the gradient [C] of weight or bias.
template <typename Row>
void sum_chunks(const typename Row::acc_t* sums, int64_t num_chunks, int64_t stride, const Row& row, Tensor& gradient) {
  std::vector<double> totals(row.padded());
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    for (int64_t i = 0; i < row.padded(); ++i) {
      totals[i] += static_cast<double>(sums[chunk * stride + i]);
    }
  }
  dispatch_floating(gradient.scalar_type(), "layer_norm: weight", [&](auto zero) {
    using weight_t = decltype(zero);
    weight_t* const values = gradient.mutable_data_ptr<weight_t>();
    for (int64_t c = 0; c < row.channels(); ++c) {
      values[c] = static_cast<weight_t>(static_cast<typename Row::acc_t>(totals[row.place(c)]));
    }
  });
}

template <bool relu, typename Row>
void backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, const Row& row,
              Tensor& grad_x, Tensor& grad_weight, Tensor& grad_bias) {
  using scalar_t = typename Row::scalar_t;
  using acc_t = typename Row::acc_t;
  const ArrangedAffine<Row> affine(weight, bias, row);
  const scalar_t* const values = x.const_data_ptr<scalar_t>();
  const scalar_t* const grads = grad.const_data_ptr<scalar_t>();
  scalar_t* const results = grad_x.mutable_data_ptr<scalar_t>();
  const int64_t channels = row.channels(), num_rows = x.numel() / channels, padded = row.padded();
  const int64_t rows_a_chunk = std::max(kLeastTiles, kLeastWork / (channels * Row::lanes)) * Row::lanes;
  const int64_t num_chunks = (num_rows + rows_a_chunk - 1) / rows_a_chunk;
  AlignedBuffer<acc_t> buffer;
  acc_t* const sums = buffer.reserve(num_chunks * 2 * padded);
  torch::stable::parallel_for(0, num_chunks, 1, [&](int64_t begin, int64_t end) {
    TileGradient<relu, Row> add_tile(row, affine, static_cast<acc_t>(eps));
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      acc_t* const chunk_sums = sums + chunk * 2 * padded;
      std::fill(chunk_sums, chunk_sums + 2 * padded, acc_t(0));
      const int64_t last = std::min((chunk + 1) * rows_a_chunk, num_rows);
      for (int64_t first = chunk * rows_a_chunk; first < last; first += Row::lanes) {
        const int64_t at = first * channels;
        add_tile(grads + at, values + at, std::min(Row::lanes, last - first), results + at, chunk_sums,
                 chunk_sums + padded);
      }
    }
  });
  sum_chunks(sums, num_chunks, 2 * padded, row, grad_weight);
  sum_chunks(sums + padded, num_chunks, 2 * padded, row, grad_bias);
}

// Call function(row, whether there is a ReLU as a constant). 64 channels, the width of the finest maps, get loops of
// constant length; from 128 on that gains nothing.
template <typename Function>
void dispatch_row(const Tensor& x, bool relu, Function function) {
  const int64_t channels = x.size(x.dim() - 1);
  const auto with_row = [&](const auto& row) {
    if (relu) {
      function(row, std::true_type{});
    } else {
      function(row, std::false_type{});
    }
  };
  dispatch_floating(x.scalar_type(), "layer_norm: x", [&](auto zero) {
    using scalar_t = decltype(zero);
    if constexpr (std::is_same_v<scalar_t, float> || std::is_same_v<scalar_t, c10::BFloat16>) {
      if (channels == 2 * Row<scalar_t, 2>::width) {
        return with_row(Row<scalar_t, 2>(channels));
      }
    }
    with_row(Row<scalar_t, 0>(channels));
  });
}

void check_arguments(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, "layer_norm: x must have the shape [..., C] with C >= 1");
  check_affine("layer_norm", x, x.size(x.dim() - 1), weight, bias);
}

Tensor layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, bool relu) {
  check_arguments(x, weight, bias);
  const Tensor rows = torch::stable::contiguous(x);
  const Tensor scale = torch::stable::contiguous(weight), offset = torch::stable::contiguous(bias);
  Tensor output = torch::stable::empty_like(rows);
  advise_huge_pages(output);
  dispatch_row(rows, relu,
               [&](const auto& row, auto has_relu) { forward<has_relu.value>(rows, scale, offset, eps, row, output); });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                       const Tensor& bias, double eps, bool relu) {
  check_arguments(x, weight, bias);
  check_grad("layer_norm", grad, x);
  const Tensor rows = torch::stable::contiguous(x), grads = torch::stable::contiguous(grad);
  const Tensor scale = torch::stable::contiguous(weight), offset = torch::stable::contiguous(bias);
  Tensor grad_x = torch::stable::empty_like(rows);
  Tensor grad_weight = torch::stable::empty_like(scale), grad_bias = torch::stable::empty_like(offset);
  advise_huge_pages(grad_x);
  dispatch_row(rows, relu, [&](const auto& row, auto has_relu) {
    backward<has_relu.value>(grads, rows, scale, offset, eps, row, grad_x, grad_weight, grad_bias);
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace seg3d

STABLE_TORCH_LIBRARY_IMPL(seg3d, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&seg3d::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&seg3d::layer_norm_backward));
}
