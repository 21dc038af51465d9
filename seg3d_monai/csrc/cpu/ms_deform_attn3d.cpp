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
// of the cache's sets. So heads are worked off one after the other: the levels that fit into the second-level cache
// together, then larger ones slab by slab, and their rows are first copied side by side (deform_walk.h). A corner that
// is outside reads a row of zeros, or adds to a row that nobody reads, so no sample has a branch.
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
  constexpr std::integral_constant<int64_t, num_lanes<acc_t>> lanes{};
  int64_t begin = 0;
  for (; channels - begin >= 4 * lanes; begin += 4 * lanes) {
    visit(begin, std::integral_constant<int64_t, 4>{}, lanes);
  }
  for (; channels - begin >= 2 * lanes; begin += 2 * lanes) {
    visit(begin, std::integral_constant<int64_t, 2>{}, lanes);
  }
  for (; channels - begin >= lanes; begin += lanes) {
    visit(begin, std::integral_constant<int64_t, 1>{}, lanes);
  }
  if (begin < channels) {
    visit(begin, std::integral_constant<int64_t, 1>{}, channels - begin);
  }
}

// The vectors of such a block, in the order that its storage type gives them (load_pair).
template <typename acc_t, int64_t vectors, typename scalar_t, typename Count>
inline void load_block(const scalar_t* source, Count last, Vec<acc_t> (&block)[vectors]) {
  if constexpr (vectors == 1) {
    block[0] = load_some_lanes<acc_t>(source, last);
  } else {
    for (int64_t v = 0; v < vectors; v += 2) {
      load_pair<acc_t>(source + v * num_lanes<acc_t>, block[v], block[v + 1]);
    }
  }
}

template <typename acc_t, int64_t vectors, typename scalar_t, typename Count>
inline void store_block(scalar_t* target, Count last, const Vec<acc_t> (&block)[vectors]) {
  if constexpr (vectors == 1) {
    store_some_lanes<acc_t>(target, block[0], last);
  } else {
    for (int64_t v = 0; v < vectors; v += 2) {
      store_pair<acc_t>(target + v * num_lanes<acc_t>, block[v], block[v + 1]);
    }
  }
}

// Round a row of sums, whose blocks are in the order of scalar_t, to their storage type.
template <typename acc_t, typename scalar_t>
inline void round_row(const acc_t* sums, int64_t channels, scalar_t* target) {
  for_channel_blocks<acc_t>(channels, [&](int64_t channel, auto vectors, auto last) {
    Vec<acc_t> block[vectors.value];
    load_block<acc_t>(sums + channel, last, block);
    store_block<acc_t>(target + channel, last, block);
  });
}

// The rows of slabs of one head's value, copied side by side where that pays.
template <typename scalar_t>
class SlabReader {
 public:
  SlabReader(const scalar_t* value, const AttendSizes& sizes, int64_t num_dense_rows)
      : value_(value), sizes_(sizes), zeros_(sizes.channels, scalar_t(0)) {
    dense_.reserve(num_dense_rows * sizes.channels);
  }

  SlabRows begin(const HeadPlace& place, const Slab& slab) {
    constexpr int64_t bytes = sizeof(scalar_t);
    const int64_t stride = sizes_.row_stride(), channels = sizes_.channels;
    const scalar_t* rows = value_ + place.first_row_channel(sizes_);
    const int64_t outside = reinterpret_cast<int64_t>(zeros_.data());
    if (!slab.is_dense) {
      return {reinterpret_cast<int64_t>(rows + slab.level->start * stride), stride * bytes, outside, false};
    }
    scalar_t* dense = dense_.reserve(0) + slab.first_row * channels;
    slab.for_each_run([&](int64_t from, int64_t to, int64_t count) {
      const scalar_t* source = rows + from * stride;
      for (int64_t row = 0; row < count; ++row) {
        __builtin_prefetch(source + (row + 16) * stride);
        std::copy_n(source + row * stride, channels, dense + (to + row) * channels);
      }
    });
    return {reinterpret_cast<int64_t>(dense), channels * bytes, outside, true};
  }

 private:
  const scalar_t* value_;
  const AttendSizes& sizes_;
  AlignedBuffer<scalar_t> dense_;
  std::vector<scalar_t> zeros_;
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
  constexpr bool is_exact = std::is_same_v<scalar_t, acc_t>;
  const DeformInputs<acc_t> inputs{locations.const_data_ptr<acc_t>(), attention.const_data_ptr<acc_t>(),
                                   output.const_data_ptr(), sizes.channels * static_cast<int64_t>(sizeof(scalar_t))};
  const scalar_t* values = value.const_data_ptr<scalar_t>();
  scalar_t* out = output.mutable_data_ptr<scalar_t>();
  torch::stable::parallel_for(0, sizes.num_heads() * sizes.queries, 64, [&](int64_t begin, int64_t end) {
    DeformWalk<acc_t> walk(sizes, sizes.channels * sizeof(scalar_t));
    SlabReader<scalar_t> reader(values, sizes, walk.num_dense_rows());
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
            for_channel_blocks<acc_t>(sizes.channels, [&](int64_t channel, auto vectors, auto last) {
              for (int64_t i = 0; i < block.count(); ++i) {
                // Two sums, so that the corners do not wait for each other.
                Vec<acc_t> parts[2][vectors.value] = {};
#pragma GCC unroll 8
                for (int64_t c = 0; c < kCorners; ++c) {
                  Vec<acc_t> row[vectors.value];
                  load_block<acc_t>(reinterpret_cast<const scalar_t*>(block.address(c, i)) + channel, last, row);
                  for (int64_t v = 0; v < vectors.value; ++v) {
                    parts[c & 1][v] += block.product(c, i) * row[v];
                  }
                }
                acc_t* target = sum + (block.query(i) - first_query) * sum_stride + channel;
                Vec<acc_t> before[vectors.value];
                load_block<acc_t>(target, last, before);
                for (int64_t v = 0; v < vectors.value; ++v) {
                  before[v] += parts[0][v] + parts[1][v];
                }
                store_block<acc_t>(target, last, before);
              }
            });
          },
          [](const Slab&) {});
      if constexpr (!is_exact) {
        for (int64_t query = first_query; query < last_query; ++query) {
          round_row(sum + (query - first_query) * sum_stride, sizes.channels, output_row(query));
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
    SlabReader<scalar_t> reader(values, sizes, walk.num_dense_rows());
    AlignedBuffer<Vec<acc_t>> buffer;
    Vec<acc_t>* const squares = buffer.reserve(kCorners * lanes);
    for_heads(begin, end, sizes, [&](const HeadPlace& place, int64_t first_query, int64_t last_query) {
      walk.run(
          inputs, place, first_query, last_query, [&](const Slab& slab) { return reader.begin(place, slab); },
          [&](const SampleBlock<acc_t>& block) {
            Vec<acc_t> products[kCorners] = {};
            for_channel_blocks<acc_t>(sizes.channels, [&](int64_t channel, auto vectors, auto last) {
              for (int64_t i = 0; i < lanes; ++i) {
                Vec<acc_t> grad_block[vectors.value];
                load_block<acc_t>(grads + place.first_output(block.query(i), sizes) + channel, last, grad_block);
                // Row i of square c holds the lanes of the product at corner c.
                for (int64_t c = 0; c < kCorners; ++c) {
                  Vec<acc_t> row[vectors.value];
                  load_block<acc_t>(reinterpret_cast<const scalar_t*>(block.address(c, i)) + channel, last, row);
                  Vec<acc_t> product = grad_block[0] * row[0];
                  for (int64_t v = 1; v < vectors.value; ++v) {
                    product += grad_block[v] * row[v];
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
              const Vec<acc_t> product = products[c];
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
  constexpr bool is_exact = std::is_same_v<scalar_t, acc_t>;
  const DeformInputs<acc_t> inputs{locations.const_data_ptr<acc_t>(), attention.const_data_ptr<acc_t>(),
                                   grad.const_data_ptr(), sizes.channels * static_cast<int64_t>(sizeof(scalar_t))};
  const scalar_t* grads = grad.const_data_ptr<scalar_t>();
  scalar_t* out = grad_value.mutable_data_ptr<scalar_t>();
  const int64_t num_threads = torch::stable::get_num_threads(), num_heads = std::max<int64_t>(sizes.num_heads(), 1);
  const int64_t num_vectors = std::max<int64_t>((sizes.channels + lanes - 1) / lanes, 1);
  const int64_t num_parts = std::min((num_threads + num_heads - 1) / num_heads, num_vectors);
  const int64_t part = (num_vectors + num_parts - 1) / num_parts * lanes;  // channels of a part
  torch::stable::parallel_for(0, sizes.num_heads() * num_parts, 1, [&](int64_t begin, int64_t end) {
    DeformWalk<acc_t> walk(sizes, part * sizeof(acc_t));
    // Half types are rounded once, at the end: all sums of the head are kept.
    AlignedBuffer<acc_t> buffer;
    acc_t* const sums = buffer.reserve((is_exact ? walk.num_dense_rows() : sizes.rows) * part);
    std::vector<acc_t> anywhere(part);  // what falls outside
    const int64_t outside = reinterpret_cast<int64_t>(anywhere.data());
    for (int64_t unit = begin; unit < end; ++unit) {
      const HeadPlace place{unit / num_parts / sizes.heads, unit / num_parts % sizes.heads};
      const int64_t first = unit % num_parts * part, channels = std::min(part, sizes.channels - first);
      if (channels <= 0) {
        continue;
      }
      scalar_t* const target = out + place.first_row_channel(sizes) + first;
      const auto begin_slab = [&](const Slab& slab) -> SlabRows {
        constexpr int64_t bytes = sizeof(acc_t);
        if constexpr (!is_exact) {
          return {reinterpret_cast<int64_t>(sums + slab.level->start * part), part * bytes, outside, false};
        } else if (slab.is_dense) {
          acc_t* dense = sums + slab.first_row * part;
          std::fill_n(dense, slab.num_rows() * part, acc_t(0));
          return {reinterpret_cast<int64_t>(dense), part * bytes, outside, true};
        } else {
          return {reinterpret_cast<int64_t>(target + slab.level->start * sizes.row_stride()),
                  sizes.row_stride() * bytes, outside, false};
        }
      };
      const auto end_slab = [&](const Slab& slab) {
        if constexpr (is_exact) {
          if (!slab.is_dense) {
            return;
          }
          slab.for_each_run([&](int64_t to, int64_t from, int64_t count) {
            for (int64_t row = 0; row < count; ++row) {
              acc_t* target_row = target + (to + row) * sizes.row_stride();
              const acc_t* dense_row = sums + (slab.first_row + from + row) * part;
              __builtin_prefetch(target_row + 16 * sizes.row_stride());
              for (int64_t c = 0; c < channels; ++c) {
                target_row[c] += dense_row[c];
              }
            }
          });
        }
      };
      if constexpr (!is_exact) {
        std::fill_n(sums, sizes.rows * part, acc_t(0));
      }
      walk.run(
          inputs, place, 0, sizes.queries, begin_slab,
          [&](const SampleBlock<acc_t>& block) {
            for_channel_blocks<acc_t>(channels, [&](int64_t channel, auto vectors, auto last) {
              for (int64_t i = 0; i < block.count(); ++i) {
                Vec<acc_t> grad_block[vectors.value];
                load_block<acc_t>(grads + place.first_output(block.query(i), sizes) + first + channel, last,
                                  grad_block);
#pragma GCC unroll 8
                for (int64_t c = 0; c < kCorners; ++c) {
                  acc_t* row = reinterpret_cast<acc_t*>(block.address(c, i)) + channel;
                  Vec<acc_t> before[vectors.value];
                  load_block<acc_t>(row, last, before);
                  for (int64_t v = 0; v < vectors.value; ++v) {
                    before[v] += block.product(c, i) * grad_block[v];
                  }
                  store_block<acc_t>(row, last, before);
                }
              }
            });
          },
          end_slab);
      if constexpr (!is_exact) {
        for (int64_t row = 0; row < sizes.rows; ++row) {
          round_row(sums + row * part, channels, target + row * sizes.row_stride());
        }
      }
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
