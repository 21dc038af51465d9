// Multi-scale deformable attention in 3D on the CPU, forward and backward.
//
// A query and head reads 8 rows of Dh values for each of its L * P samples. Their places and weights are listed first,
// then the rows are summed, vectorised over channels, each read once and never stored. The backward pass goes twice
// over the samples: for the gradients of locations and weights every query works alone; for the gradient of the value
// every head (or a part of its channels, if there are fewer heads than threads) belongs to one thread, which adds the
// queries in their order: no atomics, and the same bits for any number of threads. Cost: N Lq M L P 8 Dh sums forward,
// three times as many with the backward pass, and nothing that grows beyond inputs and outputs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "cpu/lanes.h"
#include "trilinear.h"

namespace seg3d {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kCorners = 8;

struct Level {
  int64_t start;  // its first row in the value
  int64_t size[3];
};

struct Sizes {
  int64_t batch, rows, heads, channels, queries, points;
  std::vector<Level> levels;

  int64_t num_samples() const { return static_cast<int64_t>(levels.size()) * points; }
  int64_t row_stride() const { return heads * channels; }
  // Samples before those of (image, query, head).
  int64_t first_sample(int64_t image, int64_t query, int64_t head) const {
    return ((image * queries + query) * heads + head) * num_samples();
  }
};

// One sample's three axes, and the row of its corner 0; corner c has the bits (z, y, x) = (c >> 2, c >> 1 & 1, c & 1).
template <typename acc_t>
struct Sample {
  PaddedSample<acc_t> axis[3];
  int64_t row;
  int64_t step[3];  // rows from the low to the high corner

  Sample(const Level& level, const acc_t* location) {
    for (int a = 0; a < 3; ++a) {
      axis[a] = zero_padded_sample(location[a] * static_cast<acc_t>(level.size[a]) - acc_t(0.5), level.size[a]);
    }
    step[0] = level.size[1] * level.size[2];
    step[1] = level.size[2];
    step[2] = 1;
    row = level.start + axis[0].low * step[0] + axis[1].low * step[1] + axis[2].low;
  }

  bool is_inside(int a, int64_t corner) const {
    return (corner >> (2 - a)) & 1 ? axis[a].high_inside : axis[a].low_inside;
  }
  bool is_inside(int64_t corner) const { return is_inside(0, corner) && is_inside(1, corner) && is_inside(2, corner); }
  acc_t weight(int a, int64_t corner) const {
    return (corner >> (2 - a)) & 1 ? axis[a].high_weight : axis[a].low_weight;
  }
  int64_t row_of(int64_t corner) const {
    return row + (corner >> 2) * step[0] + (corner >> 1 & 1) * step[1] + (corner & 1);
  }
};

// The rows that one (query, head) reads, with the products of trilinear and attention weights.
template <typename acc_t>
struct RowList {
  std::vector<int64_t> row;
  std::vector<acc_t> weight;
  int64_t count = 0;

  explicit RowList(const Sizes& sizes) : row(sizes.num_samples() * kCorners), weight(row.size()) {}

  void fill(const Sizes& sizes, const acc_t* location, const acc_t* attention) {
    count = 0;
    for (const Level& level : sizes.levels) {
      for (int64_t p = 0; p < sizes.points; ++p, location += 3, ++attention) {
        const Sample<acc_t> sample(level, location);
        for (int64_t corner = 0; corner < kCorners; ++corner) {
          row[count] = sample.row_of(corner);
          weight[count] = sample.weight(0, corner) * sample.weight(1, corner) * sample.weight(2, corner) * *attention;
          count += sample.is_inside(corner);
        }
      }
    }
  }
};

// Call visit(first channel, number of vectors as a constant, channels in the last of them) for all channels.
template <typename acc_t, typename Visit>
inline void for_channel_blocks(int64_t begin, int64_t end, Visit visit) {
  constexpr int64_t lanes = num_lanes<acc_t>;
  while (begin < end) {
    const int64_t left = end - begin;
    if (left >= 4 * lanes) {
      visit(begin, std::integral_constant<int64_t, 4>{}, lanes);
      begin += 4 * lanes;
    } else if (left >= 2 * lanes) {
      visit(begin, std::integral_constant<int64_t, 2>{}, lanes);
      begin += 2 * lanes;
    } else {
      visit(begin, std::integral_constant<int64_t, 1>{}, std::min(left, lanes));
      begin += lanes;
    }
  }
}

template <typename scalar_t>
void forward(const Tensor& value, const Tensor& locations, const Tensor& attention, const Sizes& sizes,
             Tensor& output) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t lanes = num_lanes<acc_t>;
  const scalar_t* rows = value.const_data_ptr<scalar_t>();
  const acc_t* location = locations.const_data_ptr<acc_t>();
  const acc_t* weight = attention.const_data_ptr<acc_t>();
  scalar_t* out = output.mutable_data_ptr<scalar_t>();
  // Queries of a head follow each other: its rows stay in the cache.
  torch::stable::parallel_for(0, sizes.batch * sizes.heads * sizes.queries, 64, [&](int64_t begin, int64_t end) {
    RowList<acc_t> list(sizes);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t query = item % sizes.queries, head = item / sizes.queries % sizes.heads;
      const int64_t image = item / sizes.queries / sizes.heads;
      const int64_t sample = sizes.first_sample(image, query, head);
      list.fill(sizes, location + sample * 3, weight + sample);
      const scalar_t* base = rows + image * sizes.rows * sizes.row_stride() + head * sizes.channels;
      scalar_t* target = out + ((image * sizes.queries + query) * sizes.heads + head) * sizes.channels;
      for_channel_blocks<acc_t>(0, sizes.channels, [&](int64_t channel, auto vectors, int64_t last) {
        Vec<acc_t> sum[vectors.value] = {};
        for (int64_t i = 0; i < list.count; ++i) {
          const scalar_t* row = base + list.row[i] * sizes.row_stride() + channel;
          for (int64_t v = 0; v < vectors.value; ++v) {
            sum[v] += list.weight[i] *
                      (vectors.value == 1 ? load_some_lanes<acc_t>(row, last) : load_lanes<acc_t>(row + v * lanes));
          }
        }
        for (int64_t v = 0; v < vectors.value; ++v) {
          if (vectors.value == 1 && last < lanes) {
            store_some_lanes<acc_t>(target + channel, sum[v], last);
          } else {
            store_lanes<acc_t>(target + channel + v * lanes, sum[v]);
          }
        }
      });
    }
  });
}

// Gradients of locations and attention weights: per corner the product of its row with the gradient of the output.
template <typename scalar_t>
void backward_samples(const Tensor& grad, const Tensor& value, const Tensor& locations, const Tensor& attention,
                      const Sizes& sizes, Tensor& grad_locations, Tensor& grad_attention) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t lanes = num_lanes<acc_t>;
  const scalar_t* rows = value.const_data_ptr<scalar_t>();
  const scalar_t* grads = grad.const_data_ptr<scalar_t>();
  const acc_t* location = locations.const_data_ptr<acc_t>();
  const acc_t* weight = attention.const_data_ptr<acc_t>();
  acc_t* grad_location = grad_locations.mutable_data_ptr<acc_t>();
  acc_t* grad_weight = grad_attention.mutable_data_ptr<acc_t>();
  torch::stable::parallel_for(0, sizes.batch * sizes.heads * sizes.queries, 64, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t query = item % sizes.queries, head = item / sizes.queries % sizes.heads;
      const int64_t image = item / sizes.queries / sizes.heads;
      const scalar_t* base = rows + image * sizes.rows * sizes.row_stride() + head * sizes.channels;
      const scalar_t* grad_row = grads + ((image * sizes.queries + query) * sizes.heads + head) * sizes.channels;
      int64_t s = sizes.first_sample(image, query, head);
      for (const Level& level : sizes.levels) {
        for (int64_t p = 0; p < sizes.points; ++p, ++s) {
          const Sample<acc_t> sample(level, location + s * 3);
          // Row c of the square holds the lanes of corner c's product; the sum over its columns is the vector of
          // products.
          static_assert(lanes >= kCorners);
          Vec<acc_t> square[lanes] = {};
          for (int64_t corner = 0; corner < kCorners; ++corner) {
            if (!sample.is_inside(corner)) {
              continue;
            }
            const scalar_t* row = base + sample.row_of(corner) * sizes.row_stride();
            for_channel_blocks<acc_t>(0, sizes.channels, [&](int64_t channel, auto vectors, int64_t last) {
              for (int64_t v = 0; v < vectors.value; ++v) {
                const int64_t at = channel + v * lanes, count = vectors.value == 1 ? last : lanes;
                square[corner] +=
                    load_some_lanes<acc_t>(grad_row + at, count) * load_some_lanes<acc_t>(row + at, count);
              }
            });
          }
          transpose<acc_t>(square);
          Vec<acc_t> product = square[0];
          for (int64_t i = 1; i < lanes; ++i) {
            product += square[i];
          }
          acc_t of_weight = 0, of_location[3] = {};
          for (int64_t corner = 0; corner < kCorners; ++corner) {
            const acc_t z = sample.weight(0, corner), y = sample.weight(1, corner), x = sample.weight(2, corner);
            of_weight += z * y * x * product[corner];
            of_location[0] += (corner & 4 ? product[corner] : -product[corner]) * y * x;
            of_location[1] += (corner & 2 ? product[corner] : -product[corner]) * z * x;
            of_location[2] += (corner & 1 ? product[corner] : -product[corner]) * z * y;
          }
          grad_weight[s] = of_weight;
          for (int a = 0; a < 3; ++a) {
            grad_location[s * 3 + a] = of_location[a] * weight[s] * static_cast<acc_t>(level.size[a]);
          }
        }
      }
    }
  });
}

template <typename scalar_t>
void backward_value(const Tensor& grad, const Tensor& locations, const Tensor& attention, const Sizes& sizes,
                    Tensor& grad_value) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t lanes = num_lanes<acc_t>;
  constexpr bool is_exact = std::is_same_v<scalar_t, acc_t>;
  const scalar_t* grads = grad.const_data_ptr<scalar_t>();
  const acc_t* location = locations.const_data_ptr<acc_t>();
  const acc_t* weight = attention.const_data_ptr<acc_t>();
  scalar_t* out = grad_value.mutable_data_ptr<scalar_t>();
  const int64_t num_threads = torch::stable::get_num_threads(), heads = sizes.batch * sizes.heads;
  const int64_t most_parts = std::max<int64_t>(1, sizes.channels / lanes);
  const int64_t num_parts = std::min(most_parts, (num_threads + heads - 1) / std::max<int64_t>(heads, 1));
  const int64_t part_channels = (sizes.channels / num_parts + lanes - 1) / lanes * lanes;
  torch::stable::parallel_for(0, heads * num_parts, 1, [&](int64_t begin, int64_t end) {
    RowList<acc_t> list(sizes);
    std::vector<acc_t> sums;  // half types are rounded once
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit / num_parts % sizes.heads, image = unit / num_parts / sizes.heads;
      const int64_t first = unit % num_parts * part_channels,
                    last_channel = std::min(sizes.channels, first + part_channels);
      if (first >= last_channel) {
        continue;
      }
      scalar_t* target = out + image * sizes.rows * sizes.row_stride() + head * sizes.channels + first;
      acc_t* sum;
      int64_t stride;
      if constexpr (is_exact) {
        sum = target;
        stride = sizes.row_stride();
      } else {
        stride = last_channel - first;
        sums.assign(sizes.rows * stride, acc_t(0));
        sum = sums.data();
      }
      for (int64_t query = 0; query < sizes.queries; ++query) {
        const int64_t sample = sizes.first_sample(image, query, head);
        list.fill(sizes, location + sample * 3, weight + sample);
        const scalar_t* grad_row =
            grads + ((image * sizes.queries + query) * sizes.heads + head) * sizes.channels + first;
        for_channel_blocks<acc_t>(0, last_channel - first, [&](int64_t channel, auto vectors, int64_t last) {
          Vec<acc_t> grad_lanes[vectors.value];
          for (int64_t v = 0; v < vectors.value; ++v) {
            grad_lanes[v] = load_some_lanes<acc_t>(grad_row + channel + v * lanes, vectors.value == 1 ? last : lanes);
          }
          for (int64_t i = 0; i < list.count; ++i) {
            acc_t* row = sum + list.row[i] * stride + channel;
            for (int64_t v = 0; v < vectors.value; ++v) {
              if (vectors.value == 1 && last < lanes) {
                store_some_lanes<acc_t>(row, load_some_lanes<acc_t>(row, last) + list.weight[i] * grad_lanes[v], last);
              } else {
                store_lanes<acc_t>(row + v * lanes,
                                   load_lanes<acc_t>(row + v * lanes) + list.weight[i] * grad_lanes[v]);
              }
            }
          }
        });
      }
      if constexpr (!is_exact) {
        for (int64_t row = 0; row < sizes.rows; ++row) {
          for (int64_t c = 0; c < stride; ++c) {
            target[row * sizes.row_stride() + c] = static_cast<scalar_t>(sums[row * stride + c]);
          }
        }
      }
    }
  });
}

// Python checks these too, with kinder words; here they keep a direct call of the operator from reading foreign memory.
Sizes checked_sizes(const Tensor& value, const Tensor& shapes, const Tensor& locations, const Tensor& attention) {
  STD_TORCH_CHECK(value.dim() == 4, "ms_deform_attn3d: value must have the shape [N, S, M, Dh]");
  STD_TORCH_CHECK(shapes.dim() == 2 && shapes.size(1) == 3 && shapes.scalar_type() == ScalarType::Long,
                  "ms_deform_attn3d: spatial_shapes must be int64 of the shape [L, 3]");
  STD_TORCH_CHECK(locations.dim() == 6 && locations.size(5) == 3,
                  "ms_deform_attn3d: sampling_locations must have the shape [N, Lq, M, L, P, 3]");
  STD_TORCH_CHECK(attention.dim() == 5, "ms_deform_attn3d: attention_weights must have the shape [N, Lq, M, L, P]");
  STD_TORCH_CHECK(value.is_cpu() && shapes.is_cpu() && locations.is_cpu() && attention.is_cpu(),
                  "ms_deform_attn3d: all tensors must be on the same device");
  const ScalarType wanted = value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(
      locations.scalar_type() == wanted && attention.scalar_type() == wanted,
      "ms_deform_attn3d: sampling_locations and attention_weights must be float64 for a float64 value, else "
      "float32");
  Sizes sizes{value.size(0), value.size(1), value.size(2), value.size(3), locations.size(1), locations.size(4), {}};
  for (int axis = 0; axis < 5; ++axis) {
    STD_TORCH_CHECK(locations.size(axis) == attention.size(axis),
                    "ms_deform_attn3d: sampling_locations and attention_weights do not fit each other");
  }
  STD_TORCH_CHECK(
      locations.size(0) == sizes.batch && locations.size(2) == sizes.heads && locations.size(3) == shapes.size(0),
      "ms_deform_attn3d: sampling_locations do not fit value and spatial_shapes");
  const Tensor rows = torch::stable::contiguous(shapes);
  const int64_t* shape = rows.const_data_ptr<int64_t>();
  int64_t start = 0;
  for (int64_t level = 0; level < shapes.size(0); ++level, shape += 3) {
    STD_TORCH_CHECK(shape[0] > 0 && shape[1] > 0 && shape[2] > 0, "ms_deform_attn3d: spatial_shapes must be positive");
    // Bounded one by one, so that no product overflows.
    const int64_t left = sizes.rows - start;
    STD_TORCH_CHECK(shape[0] <= left && shape[1] <= left / shape[0] && shape[2] <= left / (shape[0] * shape[1]),
                    "ms_deform_attn3d: spatial_shapes cover more than the ", sizes.rows, " rows of value");
    sizes.levels.push_back({start, {shape[0], shape[1], shape[2]}});
    start += shape[0] * shape[1] * shape[2];
  }
  STD_TORCH_CHECK(start == sizes.rows, "ms_deform_attn3d: spatial_shapes cover ", start, " of the ", sizes.rows,
                  " rows of value");
  return sizes;
}

template <typename Function>
void dispatch(ScalarType dtype, Function function) {
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
      STD_TORCH_CHECK(false, "ms_deform_attn3d: value must be float64, float32, bfloat16 or float16");
  }
}

Tensor ms_deform_attn3d(const Tensor& value, const Tensor& spatial_shapes, const Tensor& sampling_locations,
                        const Tensor& attention_weights) {
  const Sizes sizes = checked_sizes(value, spatial_shapes, sampling_locations, attention_weights);
  const Tensor rows = torch::stable::contiguous(value), locations = torch::stable::contiguous(sampling_locations);
  const Tensor attention = torch::stable::contiguous(attention_weights);
  Tensor output = torch::stable::new_empty(value, {sizes.batch, sizes.queries, sizes.row_stride()});
  dispatch(value.scalar_type(), [&](auto zero) { forward<decltype(zero)>(rows, locations, attention, sizes, output); });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn3d_backward(const Tensor& grad, const Tensor& value,
                                                             const Tensor& spatial_shapes,
                                                             const Tensor& sampling_locations,
                                                             const Tensor& attention_weights) {
  const Sizes sizes = checked_sizes(value, spatial_shapes, sampling_locations, attention_weights);
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == sizes.batch && grad.size(1) == sizes.queries &&
                      grad.size(2) == sizes.row_stride() && grad.scalar_type() == value.scalar_type(),
                  "ms_deform_attn3d_backward: grad must have the dtype of value and the shape [N, Lq, M * Dh]");
  const Tensor rows = torch::stable::contiguous(value), locations = torch::stable::contiguous(sampling_locations);
  const Tensor attention = torch::stable::contiguous(attention_weights), grads = torch::stable::contiguous(grad);
  Tensor grad_value = torch::stable::new_zeros(rows, {sizes.batch, sizes.rows, sizes.heads, sizes.channels});
  Tensor grad_locations = torch::stable::empty_like(locations);
  Tensor grad_attention = torch::stable::empty_like(attention);
  dispatch(value.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    backward_value<scalar_t>(grads, locations, attention, sizes, grad_value);
    backward_samples<scalar_t>(grads, rows, locations, attention, sizes, grad_locations, grad_attention);
  });
  return {grad_value, grad_locations, grad_attention};
}

}  // namespace
}  // namespace seg3d

STABLE_TORCH_LIBRARY_IMPL(seg3d, CPU, m) {
  m.impl("ms_deform_attn3d", TORCH_BOX(&seg3d::ms_deform_attn3d));
  m.impl("ms_deform_attn3d_backward", TORCH_BOX(&seg3d::ms_deform_attn3d_backward));
}
