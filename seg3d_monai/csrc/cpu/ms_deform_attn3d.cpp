// Multi-scale deformable attention in 3D on the CPU, forward and backward.
//
// A sample reads 8 rows of Dh values. Samples are placed as many at a time as a vector has lanes, then their rows are
// summed, vectorised over channels, each read once and never stored. The backward pass goes twice over the samples: for
// the gradients of locations and weights, where each sample stands alone, and for the gradient of the value, where
// every head (or a part of its channels, if there are fewer heads than threads) belongs to one thread, which adds the
// samples in a fixed order: no atomics, and the same bits for any number of threads.
//
// Cost: N Lq M L P 8 Dh sums forward, three times as many with the backward pass. What limits it is the memory: rows
// are read in no order, and the heads of a row lie side by side, so the rows of a head lie far apart and use a fraction
// of the cache's sets. So a head is worked off level by level, a large level slab by slab, and the rows of a slab
// are first copied side by side into a buffer that fits into the second-level cache (deform_walk.h).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/deform_walk.h"
#include "cpu/huge_pages.h"
#include "cpu/lanes.h"
#include "dispatch.h"

namespace seg3d {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

// The rows of slabs of one head's value, copied side by side where that pays.
template <typename scalar_t>
class SlabReader {
 public:
  SlabReader(const scalar_t* value, const AttendSizes& sizes) : value_(value), sizes_(sizes) {}

  SlabRows begin(const HeadPlace& place, const Slab& slab) {
    constexpr int64_t bytes = sizeof(scalar_t);
    const int64_t stride = sizes_.row_stride(), channels = sizes_.channels;
    const scalar_t* rows = value_ + place.first_row_channel(sizes_);
    if (!slab.is_dense) {
      return {reinterpret_cast<int64_t>(rows + slab.level->start * stride), stride * bytes, false};
    }
    scalar_t* dense = dense_.reserve(slab.num_rows() * channels);
    slab.for_each_run([&](int64_t from, int64_t to, int64_t count) {
      for (int64_t row = 0; row < count; ++row) {
        std::copy_n(rows + (from + row) * stride, channels, dense + (to + row) * channels);
      }
    });
    return {reinterpret_cast<int64_t>(dense), channels * bytes, true};
  }

 private:
  const scalar_t* value_;
  const AttendSizes& sizes_;
  AlignedBuffer<scalar_t> dense_;
};

// Call visit(place, first query, last query) for each head that has queries among the items begin .. end, which count
// the queries of one head after those of another.
template <typename Visit>
inline void for_heads(int64_t begin, int64_t end, const AttendSizes& sizes, Visit visit) {
  while (begin < end) {
    const int64_t head = begin / sizes.queries, first = begin % sizes.queries;
    const int64_t count = std::min(end - begin, sizes.queries - first);
    visit(HeadPlace{head / sizes.heads, head % sizes.heads}, first, first + count);
    begin += count;
  }
}

template <typename scalar_t>
void forward(const Tensor& value, const Tensor& locations, const Tensor& attention, const AttendSizes& sizes,
             Tensor& output) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t lanes = num_lanes<acc_t>;
  constexpr bool is_exact = std::is_same_v<scalar_t, acc_t>;
  const DeformInputs<acc_t> inputs{locations.const_data_ptr<acc_t>(), attention.const_data_ptr<acc_t>(),
                                   output.const_data_ptr(), sizes.channels * static_cast<int64_t>(sizeof(scalar_t))};
  const scalar_t* values = value.const_data_ptr<scalar_t>();
  scalar_t* out = output.mutable_data_ptr<scalar_t>();
  torch::stable::parallel_for(0, sizes.num_heads() * sizes.queries, 64, [&](int64_t begin, int64_t end) {
    DeformWalk<acc_t> walk(sizes, sizes.channels * sizeof(scalar_t));
    SlabReader<scalar_t> reader(values, sizes);
    std::vector<acc_t> sums;  // half types are rounded once
    for_heads(begin, end, sizes, [&](const HeadPlace& place, int64_t first_query, int64_t last_query) {
      const auto output_row = [&](int64_t query) { return out + place.first_output(query, sizes); };
      acc_t* sum;
      int64_t sum_stride = sizes.row_stride();
      if constexpr (is_exact) {
        sum = output_row(first_query);
        for (int64_t query = first_query; query < last_query; ++query) {
          std::fill_n(output_row(query), sizes.channels, acc_t(0));
        }
      } else {
        sum_stride = sizes.channels;
        sums.assign((last_query - first_query) * sum_stride, acc_t(0));
        sum = sums.data();
      }
      walk.run(
          inputs, place, first_query, last_query, [&](const Slab& slab) { return reader.begin(place, slab); },
          [&](const SampleBlock<acc_t>& block) {
            for_channel_blocks<acc_t>(sizes.channels, [&](int64_t channel, auto vectors, int64_t last) {
              block.for_each_sample([&](int64_t query, auto for_each_corner) {
                acc_t* target = sum + (query - first_query) * sum_stride + channel;
                Vec<acc_t> sum_lanes[vectors.value];
                for (int64_t v = 0; v < vectors.value; ++v) {
                  sum_lanes[v] = load_some_lanes<acc_t>(target + v * lanes, last);
                }
                for_each_corner([&](int64_t address, acc_t weight) {
                  const scalar_t* row = reinterpret_cast<const scalar_t*>(address) + channel;
                  for (int64_t v = 0; v < vectors.value; ++v) {
                    sum_lanes[v] += weight * load_some_lanes<acc_t>(row + v * lanes, last);
                  }
                });
                for (int64_t v = 0; v < vectors.value; ++v) {
                  store_some_lanes<acc_t>(target + v * lanes, sum_lanes[v], last);
                }
              });
            });
          },
          [](const Slab&) {});
      if constexpr (!is_exact) {
        for (int64_t query = first_query; query < last_query; ++query) {
          const acc_t* row = sum + (query - first_query) * sum_stride;
          std::transform(row, row + sizes.channels, output_row(query),
                         [](acc_t number) { return static_cast<scalar_t>(number); });
        }
      }
    });
  });
}

// Gradients of locations and attention weights: per corner the product of its row with the gradient of the output.
template <typename scalar_t>
void backward_samples(const Tensor& grad, const Tensor& value, const Tensor& locations, const Tensor& attention,
                      const AttendSizes& sizes, Tensor& grad_locations, Tensor& grad_attention) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t lanes = num_lanes<acc_t>;
  const DeformInputs<acc_t> inputs{locations.const_data_ptr<acc_t>(), attention.const_data_ptr<acc_t>(),
                                   grad.const_data_ptr(), sizes.channels * static_cast<int64_t>(sizeof(scalar_t))};
  const scalar_t* values = value.const_data_ptr<scalar_t>();
  const scalar_t* grads = grad.const_data_ptr<scalar_t>();
  acc_t* grad_location = grad_locations.mutable_data_ptr<acc_t>();
  acc_t* grad_share = grad_attention.mutable_data_ptr<acc_t>();
  torch::stable::parallel_for(0, sizes.num_heads() * sizes.queries, 64, [&](int64_t begin, int64_t end) {
    DeformWalk<acc_t> walk(sizes, sizes.channels * sizeof(scalar_t));
    SlabReader<scalar_t> reader(values, sizes);
    AlignedBuffer<Vec<acc_t>> buffer;
    Vec<acc_t>* const squares = buffer.reserve(kCorners * lanes);
    for_heads(begin, end, sizes, [&](const HeadPlace& place, int64_t first_query, int64_t last_query) {
      walk.run(
          inputs, place, first_query, last_query, [&](const Slab& slab) { return reader.begin(place, slab); },
          [&](const SampleBlock<acc_t>& block) {
            Vec<acc_t> products[kCorners] = {};
            for_channel_blocks<acc_t>(sizes.channels, [&](int64_t channel, auto vectors, int64_t last) {
              for (int64_t i = 0; i < lanes; ++i) {
                const scalar_t* grad_row = grads + place.first_output(block.query(i), sizes) + channel;
                Vec<acc_t> grad_lanes[vectors.value];
                for (int64_t v = 0; v < vectors.value; ++v) {
                  grad_lanes[v] = load_some_lanes<acc_t>(grad_row + v * lanes, last);
                }
                // Row i of square c holds the lanes of the product at corner c. A corner that is outside reads some
                // row, and forgets it below.
                for (int64_t c = 0; c < kCorners; ++c) {
                  const scalar_t* row = reinterpret_cast<const scalar_t*>(block.address(c, i)) + channel;
                  Vec<acc_t> product = grad_lanes[0] * load_some_lanes<acc_t>(row, last);
                  for (int64_t v = 1; v < vectors.value; ++v) {
                    product += grad_lanes[v] * load_some_lanes<acc_t>(row + v * lanes, last);
                  }
                  squares[c * lanes + i] = product;
                }
              }
              for (int64_t c = 0; c < kCorners; ++c) {
                products[c] += sums_of_rows<acc_t>(&squares[c * lanes]);
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
            for (int axis = 0; axis < 3; ++axis) {
              of_position[axis] *= block.shares() * block.size(axis);
            }
            for (int64_t i = 0; i < block.count(); ++i) {
              grad_share[block.sample(i)] = of_share[i];
              for (int axis = 0; axis < 3; ++axis) {
                grad_location[block.sample(i) * 3 + axis] = of_position[axis][i];
              }
            }
          },
          [](const Slab&) {});
    });
  });
}

template <typename scalar_t>
void backward_value(const Tensor& grad, const Tensor& locations, const Tensor& attention, const AttendSizes& sizes,
                    Tensor& grad_value) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t lanes = num_lanes<acc_t>;
  const DeformInputs<acc_t> inputs{locations.const_data_ptr<acc_t>(), attention.const_data_ptr<acc_t>(),
                                   grad.const_data_ptr(), sizes.channels * static_cast<int64_t>(sizeof(scalar_t))};
  const scalar_t* grads = grad.const_data_ptr<scalar_t>();
  scalar_t* out = grad_value.mutable_data_ptr<scalar_t>();
  const int64_t num_threads = torch::stable::get_num_threads(), num_heads = std::max<int64_t>(sizes.num_heads(), 1);
  const int64_t num_vectors = std::max<int64_t>((sizes.channels + lanes - 1) / lanes, 1);
  const int64_t num_parts = std::min((num_threads + num_heads - 1) / num_heads, num_vectors);
  const int64_t part = (num_vectors + num_parts - 1) / num_parts * lanes;  // channels of a part
  torch::stable::parallel_for(0, sizes.num_heads() * num_parts, 1, [&](int64_t begin, int64_t end) {
    DeformWalk<acc_t> walk(sizes, sizes.channels * sizeof(acc_t));
    AlignedBuffer<acc_t> dense;
    for (int64_t unit = begin; unit < end; ++unit) {
      const HeadPlace place{unit / num_parts / sizes.heads, unit / num_parts % sizes.heads};
      const int64_t first = unit % num_parts * part, channels = std::min(part, sizes.channels - first);
      if (channels <= 0) {
        continue;
      }
      scalar_t* const target = out + place.first_row_channel(sizes) + first;
      acc_t* sums = nullptr;
      // Half types are rounded once, after the last slab: their sums are those of a whole level.
      const auto begin_slab = [&](const Slab& slab) -> SlabRows {
        constexpr int64_t bytes = sizeof(acc_t);
        const Level& level = *slab.level;
        if constexpr (!std::is_same_v<scalar_t, acc_t>) {
          sums = dense.reserve(level.num_rows() * part);
          if (slab.is_first) {
            std::fill_n(sums, level.num_rows() * part, acc_t(0));
          }
          return {reinterpret_cast<int64_t>(sums), part * bytes, false};
        } else if (slab.is_dense) {
          sums = dense.reserve(slab.num_rows() * part);
          std::fill_n(sums, slab.num_rows() * part, acc_t(0));
          return {reinterpret_cast<int64_t>(sums), part * bytes, true};
        } else {
          return {reinterpret_cast<int64_t>(target + level.start * sizes.row_stride()), sizes.row_stride() * bytes,
                  false};
        }
      };
      const auto end_slab = [&](const Slab& slab) {
        if constexpr (!std::is_same_v<scalar_t, acc_t>) {
          for (int64_t row = 0; slab.is_last && row < slab.level->num_rows(); ++row) {
            for (int64_t c = 0; c < channels; ++c) {
              target[(slab.level->start + row) * sizes.row_stride() + c] = static_cast<scalar_t>(sums[row * part + c]);
            }
          }
        } else if (slab.is_dense) {
          slab.for_each_run([&](int64_t to, int64_t from, int64_t count) {
            for (int64_t row = 0; row < count; ++row) {
              acc_t* target_row = target + (to + row) * sizes.row_stride();
              for (int64_t c = 0; c < channels; ++c) {
                target_row[c] += sums[(from + row) * part + c];
              }
            }
          });
        }
      };
      walk.run(
          inputs, place, 0, sizes.queries, begin_slab,
          [&](const SampleBlock<acc_t>& block) {
            for_channel_blocks<acc_t>(channels, [&](int64_t channel, auto vectors, int64_t last) {
              block.for_each_sample([&](int64_t query, auto for_each_corner) {
                const scalar_t* grad_row = grads + place.first_output(query, sizes) + first + channel;
                Vec<acc_t> grad_lanes[vectors.value];
                for (int64_t v = 0; v < vectors.value; ++v) {
                  grad_lanes[v] = load_some_lanes<acc_t>(grad_row + v * lanes, last);
                }
                for_each_corner([&](int64_t address, acc_t weight) {
                  acc_t* row = reinterpret_cast<acc_t*>(address) + channel;
                  for (int64_t v = 0; v < vectors.value; ++v) {
                    const Vec<acc_t> before = load_some_lanes<acc_t>(row + v * lanes, last);
                    store_some_lanes<acc_t>(row + v * lanes, before + weight * grad_lanes[v], last);
                  }
                });
              });
            });
          },
          end_slab);
    }
  });
}

// Python checks these too, with kinder words; here they keep a direct call of the operator from reading foreign memory.
AttendSizes checked_sizes(const Tensor& value, const Tensor& shapes, const Tensor& locations, const Tensor& attention) {
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
  AttendSizes sizes{
      value.size(0), value.size(1), value.size(2), value.size(3), locations.size(1), locations.size(4), {}};
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
    STD_TORCH_CHECK(sizes.levels.back().num_rows() < int64_t(1) << 31,
                    "ms_deform_attn3d: a level must have fewer than 2^31 voxels");
  }
  STD_TORCH_CHECK(start == sizes.rows, "ms_deform_attn3d: spatial_shapes cover ", start, " of the ", sizes.rows,
                  " rows of value");
  return sizes;
}

Tensor ms_deform_attn3d(const Tensor& value, const Tensor& spatial_shapes, const Tensor& sampling_locations,
                        const Tensor& attention_weights) {
  const AttendSizes sizes = checked_sizes(value, spatial_shapes, sampling_locations, attention_weights);
  const Tensor rows = torch::stable::contiguous(value), locations = torch::stable::contiguous(sampling_locations);
  const Tensor attention = torch::stable::contiguous(attention_weights);
  Tensor output = torch::stable::new_empty(value, {sizes.batch, sizes.queries, sizes.row_stride()});
  advise_huge_pages(output);
  dispatch_floating(value.scalar_type(), "ms_deform_attn3d: value",
                    [&](auto zero) { forward<decltype(zero)>(rows, locations, attention, sizes, output); });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn3d_backward(const Tensor& grad, const Tensor& value,
                                                             const Tensor& spatial_shapes,
                                                             const Tensor& sampling_locations,
                                                             const Tensor& attention_weights) {
  const AttendSizes sizes = checked_sizes(value, spatial_shapes, sampling_locations, attention_weights);
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == sizes.batch && grad.size(1) == sizes.queries &&
                      grad.size(2) == sizes.row_stride() && grad.scalar_type() == value.scalar_type(),
                  "ms_deform_attn3d_backward: grad must have the dtype of value and the shape [N, Lq, M * Dh]");
  const Tensor rows = torch::stable::contiguous(value), locations = torch::stable::contiguous(sampling_locations);
  const Tensor attention = torch::stable::contiguous(attention_weights), grads = torch::stable::contiguous(grad);
  Tensor grad_value = torch::stable::new_empty(rows, {sizes.batch, sizes.rows, sizes.heads, sizes.channels});
  advise_huge_pages(grad_value);
  torch::stable::zero_(grad_value);
  Tensor grad_locations = torch::stable::empty_like(locations);
  Tensor grad_attention = torch::stable::empty_like(attention);
  advise_huge_pages(grad_locations);
  advise_huge_pages(grad_attention);
  dispatch_floating(value.scalar_type(), "ms_deform_attn3d: value", [&](auto zero) {
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
