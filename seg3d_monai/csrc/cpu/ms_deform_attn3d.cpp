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
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/lanes.h"

namespace seg3d {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kCorners = 8;

struct Level {
  int64_t start;  // its first row in the value
  std::array<int64_t, 3> size;
};

struct Sizes {
  int64_t batch, rows, heads, channels, queries, points;
  std::vector<Level> levels;

  int64_t num_samples() const { return static_cast<int64_t>(levels.size()) * points; }  // of one (query, head)
  int64_t row_stride() const { return heads * channels; }
};

// Where one (image, query, head) finds its samples and its channels of the output.
struct Item {
  int64_t first_sample, first_output, first_row_channel;

  // Queries of a head follow each other: its rows stay in the cache.
  Item(int64_t index, const Sizes& sizes)
      : Item(index / sizes.queries / sizes.heads, index / sizes.queries % sizes.heads, index % sizes.queries, sizes) {}
  Item(int64_t image, int64_t head, int64_t query, const Sizes& sizes) {
    const int64_t place = (image * sizes.queries + query) * sizes.heads + head;
    first_sample = place * sizes.num_samples();
    first_output = place * sizes.channels;
    first_row_channel = image * sizes.rows * sizes.row_stride() + head * sizes.channels;
  }
};

// As many samples of one (query, head) as a vector has lanes. Corner c has the bits (z, y, x), 1 for the high side.
template <typename acc_t>
class SampleBlock {
 public:
  using Index = typename VecOf<acc_t>::index;
  static constexpr int64_t lanes = num_lanes<acc_t>;

  // Row r of the value, or of its gradient, begins r * row_stride numbers after the first.
  SampleBlock(const Sizes& sizes, int64_t row_stride, int64_t first)
      : first_(first), count_(std::min(lanes, sizes.num_samples() - first)), row_stride_(row_stride) {
    for (int64_t i = 0; i < count_; ++i) {
      const Level& level = sizes.levels[(first + i) / sizes.points];
      const int64_t steps[3] = {level.size[1] * level.size[2], level.size[2], 1};
      for (int axis = 0; axis < 3; ++axis) {
        size_[axis][i] = static_cast<acc_t>(level.size[axis]);
        last_[axis][i] = level.size[axis] - 1;
        row_step_[axis][i] = steps[axis];
      }
      start_[i] = level.start;
      for (int64_t c = 0; c < kCorners; ++c) {
        corner_step_[c][i] = ((c >> 2) * steps[0] + (c >> 1 & 1) * steps[1] + (c & 1)) * row_stride;
      }
    }
  }

  int64_t first() const { return first_; }
  int64_t count() const { return count_; }

  // Place the samples of one (query, head): zero_padded_sample of trilinear.h for all lanes at once.
  void place(const acc_t* locations) {
    Vec<acc_t> positions[3];
    if (count_ == lanes) {
      load_triples<acc_t>(locations, positions);
    } else {
      acc_t padded[3 * lanes] = {};
      std::copy(locations, locations + 3 * count_, padded);
      load_triples<acc_t>(padded, positions);
    }
    Index row = start_, side_inside[3][2];
    for (int axis = 0; axis < 3; ++axis) {
      Vec<acc_t> position = positions[axis] * size_[axis] - acc_t(0.5);
      const Index is_near = (position >= acc_t(-1)) & (position < size_[axis]);
      position = is_near ? position : Vec<acc_t>{};
      Index low = __builtin_convertvector(position, Index);
      low += __builtin_convertvector(low, Vec<acc_t>) > position;  // a comparison that holds is -1
      weight_[axis][1] = position - __builtin_convertvector(low, Vec<acc_t>);
      weight_[axis][0] = acc_t(1) - weight_[axis][1];
      side_inside[axis][0] = is_near & (low >= 0);
      side_inside[axis][1] = is_near & (low < last_[axis]);
      row += low * row_step_[axis];
    }
    alignas(64) int64_t first_corner[lanes];
    for (int64_t i = 0; i < lanes; ++i) {
      first_corner[i] = static_cast<int64_t>(row[i]) * row_stride_;
    }
    Index all_inside = {};
#pragma GCC unroll 8
    for (int64_t c = 0; c < kCorners; ++c) {
      const Index is_inside = side_inside[0][c >> 2] & side_inside[1][c >> 1 & 1] & side_inside[2][c & 1];
      all_inside |= is_inside & (1 << c);
      // A corner that is outside gets the first row, to be read and forgotten.
      for (int64_t i = 0; i < lanes; ++i) {
        offset_[c][i] = (first_corner[i] + corner_step_[c][i]) & is_inside[i];
      }
    }
    inside_ = all_inside;
  }

  Vec<acc_t> weight(int axis, int64_t side) const { return weight_[axis][side]; }
  Vec<acc_t> size(int axis) const { return size_[axis]; }
  Index is_inside(int64_t corner) const { return (inside_ & (1 << corner)) != 0; }
  int64_t offset(int64_t corner, int64_t sample) const { return offset_[corner][sample]; }

  // Call visit(offset of the row, product of trilinear and attention weight) for all corners that are inside.
  template <typename Visit>
  void for_each_corner(const acc_t* attention, Visit visit) const {
    const Vec<acc_t> shares = load_some_lanes<acc_t>(attention, count_);
    alignas(64) acc_t products[kCorners][lanes];
    for (int64_t c = 0; c < kCorners; ++c) {
      const Vec<acc_t> trilinear = weight_[0][c >> 2] * weight_[1][c >> 1 & 1] * weight_[2][c & 1];
      store_lanes<acc_t>(products[c], trilinear * shares);
    }
    alignas(64) std::conditional_t<sizeof(acc_t) == 4, int32_t, int64_t> inside[lanes];
    std::memcpy(inside, &inside_, sizeof(inside));
    for (int64_t i = 0; i < count_; ++i) {
      if (inside[i] == (1 << kCorners) - 1) {
        for (int64_t c = 0; c < kCorners; ++c) {
          visit(offset_[c][i], products[c][i]);
        }
      } else {
        for (uint32_t left = static_cast<uint32_t>(inside[i]); left != 0; left &= left - 1) {
          const int c = std::countr_zero(left);
          visit(offset_[c][i], products[c][i]);
        }
      }
    }
  }

 private:
  // What is the same for every query and head. Lanes without a sample have no voxel inside.
  Vec<acc_t> size_[3] = {};
  Index last_[3] = {Index{} - 1, Index{} - 1, Index{} - 1}, row_step_[3] = {}, start_ = {};
  alignas(64) int64_t corner_step_[kCorners][lanes] = {};  // in numbers, from corner 0
  int64_t first_, count_, row_stride_;

  // What differs.
  Vec<acc_t> weight_[3][2];
  Index inside_;  // bit c: corner c is inside
  alignas(64) int64_t offset_[kCorners][lanes];
};

template <typename acc_t>
std::vector<SampleBlock<acc_t>> make_blocks(const Sizes& sizes, int64_t row_stride) {
  std::vector<SampleBlock<acc_t>> blocks;
  for (int64_t first = 0; first < sizes.num_samples(); first += num_lanes<acc_t>) {
    blocks.emplace_back(sizes, row_stride, first);
  }
  return blocks;
}

// Call visit(first channel, number of vectors as a constant, channels in the last of them) until all are visited.
template <typename acc_t, typename Visit>
inline void for_channel_blocks(int64_t channels, Visit visit) {
  constexpr int64_t lanes = num_lanes<acc_t>;
  int64_t begin = 0;
  for (; channels - begin >= 4 * lanes; begin += 4 * lanes) {
    visit(begin, std::integral_constant<int64_t, 4>{}, lanes);
  }
  for (; channels - begin >= 2 * lanes; begin += 2 * lanes) {
    visit(begin, std::integral_constant<int64_t, 2>{}, lanes);
  }
  for (; begin < channels; begin += lanes) {
    visit(begin, std::integral_constant<int64_t, 1>{}, std::min(channels - begin, lanes));
  }
}

template <typename scalar_t>
void forward(const Tensor& value, const Tensor& locations, const Tensor& attention, const Sizes& sizes,
             Tensor& output) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t lanes = num_lanes<acc_t>;
  const scalar_t* rows = value.const_data_ptr<scalar_t>();
  const acc_t* location = locations.const_data_ptr<acc_t>();
  const acc_t* share = attention.const_data_ptr<acc_t>();
  scalar_t* out = output.mutable_data_ptr<scalar_t>();
  torch::stable::parallel_for(0, sizes.batch * sizes.heads * sizes.queries, 64, [&](int64_t begin, int64_t end) {
    auto blocks = make_blocks<acc_t>(sizes, sizes.row_stride());
    for (int64_t index = begin; index < end; ++index) {
      const Item item(index, sizes);
      for (auto& block : blocks) {
        block.place(location + (item.first_sample + block.first()) * 3);
      }
      for_channel_blocks<acc_t>(sizes.channels, [&](int64_t channel, auto vectors, int64_t last) {
        const scalar_t* base = rows + item.first_row_channel + channel;
        Vec<acc_t> sum[vectors.value] = {};
        for (const auto& block : blocks) {
          block.for_each_corner(share + item.first_sample + block.first(), [&](int64_t offset, acc_t weight) {
            for (int64_t v = 0; v < vectors.value; ++v) {
              sum[v] += weight * load_some_lanes<acc_t>(base + offset + v * lanes, last);
            }
          });
        }
        for (int64_t v = 0; v < vectors.value; ++v) {
          store_some_lanes<acc_t>(out + item.first_output + channel + v * lanes, sum[v], last);
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
  const acc_t* share = attention.const_data_ptr<acc_t>();
  acc_t* grad_location = grad_locations.mutable_data_ptr<acc_t>();
  acc_t* grad_share = grad_attention.mutable_data_ptr<acc_t>();
  torch::stable::parallel_for(0, sizes.batch * sizes.heads * sizes.queries, 64, [&](int64_t begin, int64_t end) {
    auto blocks = make_blocks<acc_t>(sizes, sizes.row_stride());
    for (int64_t index = begin; index < end; ++index) {
      const Item item(index, sizes);
      for (auto& block : blocks) {
        const int64_t first = item.first_sample + block.first();
        block.place(location + first * 3);
        Vec<acc_t> products[kCorners] = {};
        for_channel_blocks<acc_t>(sizes.channels, [&](int64_t channel, auto vectors, int64_t last) {
          const scalar_t* base = rows + item.first_row_channel + channel;
          Vec<acc_t> grad_lanes[vectors.value];
          for (int64_t v = 0; v < vectors.value; ++v) {
            grad_lanes[v] = load_some_lanes<acc_t>(grads + item.first_output + channel + v * lanes, last);
          }
          for (int64_t c = 0; c < kCorners; ++c) {
            Vec<acc_t> square[lanes];  // row i holds the lanes of sample i's product
            for (int64_t i = 0; i < lanes; ++i) {
              const scalar_t* row = base + block.offset(c, i);
              square[i] = grad_lanes[0] * load_some_lanes<acc_t>(row, last);
              for (int64_t v = 1; v < vectors.value; ++v) {
                square[i] += grad_lanes[v] * load_some_lanes<acc_t>(row + v * lanes, last);
              }
            }
            products[c] += sums_of_rows<acc_t>(square);
          }
        });
        Vec<acc_t> of_share = {}, of_position[3] = {};
        for (int64_t c = 0; c < kCorners; ++c) {
          const Vec<acc_t> product = block.is_inside(c) ? products[c] : Vec<acc_t>{};
          const Vec<acc_t> z = block.weight(0, c >> 2), y = block.weight(1, c >> 1 & 1), x = block.weight(2, c & 1);
          of_share += product * (z * y * x);
          of_position[0] += (c & 4 ? product : -product) * (y * x);
          of_position[1] += (c & 2 ? product : -product) * (z * x);
          of_position[2] += (c & 1 ? product : -product) * (z * y);
        }
        store_some_lanes<acc_t>(grad_share + first, of_share, block.count());
        const Vec<acc_t> shares = load_some_lanes<acc_t>(share + first, block.count());
        for (int axis = 0; axis < 3; ++axis) {
          of_position[axis] *= shares * block.size(axis);
        }
        if (block.count() == lanes) {
          store_triples<acc_t>(grad_location + first * 3, of_position);
        } else {
          acc_t padded[3 * lanes];
          store_triples<acc_t>(padded, of_position);
          std::copy(padded, padded + 3 * block.count(), grad_location + first * 3);
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
  const acc_t* share = attention.const_data_ptr<acc_t>();
  scalar_t* out = grad_value.mutable_data_ptr<scalar_t>();
  const int64_t num_threads = torch::stable::get_num_threads(), num_heads = sizes.batch * sizes.heads;
  const int64_t num_vectors = (sizes.channels + lanes - 1) / lanes;
  const int64_t num_parts = std::clamp<int64_t>((num_threads + num_heads - 1) / std::max<int64_t>(num_heads, 1), 1,
                                                std::max<int64_t>(num_vectors, 1));
  const int64_t part = (num_vectors + num_parts - 1) / num_parts * lanes;  // channels of a part
  torch::stable::parallel_for(0, num_heads * num_parts, 1, [&](int64_t begin, int64_t end) {
    // Half types are rounded once, after the last query.
    std::vector<acc_t> sums(is_exact ? 0 : sizes.rows * part);
    auto blocks = make_blocks<acc_t>(sizes, is_exact ? sizes.row_stride() : part);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / num_parts / sizes.heads, head = unit / num_parts % sizes.heads;
      const int64_t first = unit % num_parts * part, channels = std::min(part, sizes.channels - first);
      if (channels <= 0) {
        continue;
      }
      scalar_t* const target = out + Item(image, head, 0, sizes).first_row_channel + first;
      acc_t* sum;
      if constexpr (is_exact) {
        sum = target;
      } else {
        std::fill(sums.begin(), sums.end(), acc_t(0));
        sum = sums.data();
      }
      for (int64_t query = 0; query < sizes.queries; ++query) {
        const Item item(image, head, query, sizes);
        for (auto& block : blocks) {
          block.place(location + (item.first_sample + block.first()) * 3);
        }
        for_channel_blocks<acc_t>(channels, [&](int64_t channel, auto vectors, int64_t last) {
          Vec<acc_t> grad_lanes[vectors.value];
          for (int64_t v = 0; v < vectors.value; ++v) {
            grad_lanes[v] = load_some_lanes<acc_t>(grads + item.first_output + first + channel + v * lanes, last);
          }
          for (const auto& block : blocks) {
            block.for_each_corner(share + item.first_sample + block.first(), [&](int64_t offset, acc_t weight) {
              for (int64_t v = 0; v < vectors.value; ++v) {
                acc_t* row = sum + offset + channel + v * lanes;
                store_some_lanes<acc_t>(row, load_some_lanes<acc_t>(row, last) + weight * grad_lanes[v], last);
              }
            });
          }
        });
      }
      if constexpr (!is_exact) {
        for (int64_t row = 0; row < sizes.rows; ++row) {
          for (int64_t c = 0; c < channels; ++c) {
            target[row * sizes.row_stride() + c] = static_cast<scalar_t>(sums[row * part + c]);
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
