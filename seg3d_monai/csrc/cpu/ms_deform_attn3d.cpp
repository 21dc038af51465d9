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
#include <numeric>
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

  int64_t num_rows() const { return size[0] * size[1] * size[2]; }
};

struct Sizes {
  int64_t batch, rows, heads, channels, queries, points;
  std::vector<Level> levels;

  int64_t num_samples() const { return static_cast<int64_t>(levels.size()) * points; }  // of one (query, head)
  int64_t row_stride() const { return heads * channels; }
};

// Where one (image, head, query) finds its samples and its channels of the output.
struct Item {
  int64_t image, head, first_sample, first_output;

  // Queries of a head follow each other: its rows stay in the cache.
  Item(int64_t index, const Sizes& sizes)
      : Item(index / sizes.queries / sizes.heads, index / sizes.queries % sizes.heads, index % sizes.queries, sizes) {}
  Item(int64_t image, int64_t head, int64_t query, const Sizes& sizes) : image(image), head(head) {
    const int64_t place = (image * sizes.queries + query) * sizes.heads + head;
    first_sample = place * sizes.num_samples();
    first_output = place * sizes.channels;
  }
};

// Where the rows of one level lie for one head, in bytes.
struct LevelRows {
  int64_t address, stride;
};

// The rows of one head. The heads of a row lie side by side, so the rows of a head lie far apart, use a fraction of the
// cache's sets, and miss it. The levels that together fit into a cache of `kBytes` are kept densely instead.
template <typename T>
class HeadRows {
 public:
  // `channels` of each head are used; the head's samples decide whether a copy pays.
  HeadRows(const Sizes& sizes, int64_t channels) : sizes_(sizes), channels_(channels), start_(sizes.levels.size(), -1) {
    std::vector<size_t> by_size(sizes.levels.size());
    std::iota(by_size.begin(), by_size.end(), size_t(0));
    std::sort(by_size.begin(), by_size.end(),
              [&](size_t a, size_t b) { return sizes.levels[a].num_rows() < sizes.levels[b].num_rows(); });
    int64_t num_rows = 0;
    for (const size_t level : by_size) {
      const int64_t level_rows = sizes.levels[level].num_rows();
      const bool fits = (num_rows + level_rows) * channels * static_cast<int64_t>(sizeof(T)) <= kBytes;
      if (sizes.heads > 1 && fits && level_rows < sizes.queries * sizes.points) {
        start_[level] = num_rows;
        num_rows += level_rows;
      }
    }
    dense_.resize(num_rows * channels);
  }

  // Begin with the head whose first number is `rows`.
  void read(const T* rows) {
    for_each_dense_row([&](int64_t row, T* dense) {
      const T* source = rows + row * sizes_.row_stride();
      std::copy(source, source + channels_, dense);
    });
  }
  void clear() { std::fill(dense_.begin(), dense_.end(), T(0.0f)); }
  void write(T* rows) {
    for_each_dense_row(
        [&](int64_t row, const T* dense) { std::copy(dense, dense + channels_, rows + row * sizes_.row_stride()); });
  }

  // Where to find the rows of each level of that head.
  std::vector<LevelRows> levels(const T* rows) const {
    std::vector<LevelRows> result;
    for (size_t level = 0; level < start_.size(); ++level) {
      const bool is_dense = start_[level] >= 0;
      const int64_t stride = is_dense ? channels_ : sizes_.row_stride();
      const T* first =
          is_dense ? dense_.data() + start_[level] * channels_ : rows + sizes_.levels[level].start * stride;
      result.push_back({reinterpret_cast<int64_t>(first), stride * static_cast<int64_t>(sizeof(T))});
    }
    return result;
  }

 private:
  static constexpr int64_t kBytes = 1 << 20;

  const Sizes& sizes_;
  int64_t channels_;
  std::vector<int64_t> start_;  // of each level in `dense_`, in rows; -1 for the levels that stay where they are
  std::vector<T> dense_;

  template <typename Visit>
  void for_each_dense_row(Visit visit) {
    for (size_t level = 0; level < start_.size(); ++level) {
      for (int64_t row = 0; start_[level] >= 0 && row < sizes_.levels[level].num_rows(); ++row) {
        visit(sizes_.levels[level].start + row, dense_.data() + (start_[level] + row) * channels_);
      }
    }
  }
};

// As many samples of one (query, head) as a vector has lanes. Corner c has the bits (z, y, x), 1 for the high side.
template <typename acc_t>
class SampleBlock {
 public:
  using Index = typename VecOf<acc_t>::index;
  static constexpr int64_t lanes = num_lanes<acc_t>;

  SampleBlock(const Sizes& sizes, int64_t first)
      : sizes_(sizes), first_(first), count_(std::min(lanes, sizes.num_samples() - first)) {
    for (int64_t i = 0; i < count_; ++i) {
      const Level& level = sizes.levels[(first + i) / sizes.points];
      for (int axis = 0; axis < 3; ++axis) {
        size_[axis][i] = static_cast<acc_t>(level.size[axis]);
        last_[axis][i] = level.size[axis] - 1;
      }
      row_step_[0][i] = level.size[1] * level.size[2];
      row_step_[1][i] = level.size[2];
      row_step_[2][i] = 1;
    }
  }

  // Begin with the head whose rows lie there.
  void read_from(const std::vector<LevelRows>& levels) {
    for (int64_t i = 0; i < lanes; ++i) {
      // Lanes without a sample never get further than their address.
      const LevelRows rows = levels[std::min(first_ + i, sizes_.num_samples() - 1) / sizes_.points];
      level_address_[i] = rows.address;
      stride_[i] = rows.stride;
      for (int64_t c = 0; c < kCorners; ++c) {
        corner_step_[c][i] = ((c >> 2) * row_step_[0][i] + (c >> 1 & 1) * row_step_[1][i] + (c & 1)) * rows.stride;
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
    Index row = {}, side_inside[3][2];
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
      first_corner[i] = level_address_[i] + static_cast<int64_t>(row[i]) * stride_[i];
    }
    Index all_inside = {};
#pragma GCC unroll 8
    for (int64_t c = 0; c < kCorners; ++c) {
      const Index is_inside = side_inside[0][c >> 2] & side_inside[1][c >> 1 & 1] & side_inside[2][c & 1];
      all_inside |= is_inside & (1 << c);
      // A corner that is outside gets the first row, to be read and forgotten.
      for (int64_t i = 0; i < lanes; ++i) {
        address_[c][i] = is_inside[i] ? first_corner[i] + corner_step_[c][i] : level_address_[i];
      }
    }
    inside_ = all_inside;
  }

  Vec<acc_t> weight(int axis, int64_t side) const { return weight_[axis][side]; }
  Vec<acc_t> size(int axis) const { return size_[axis]; }
  Index is_inside(int64_t corner) const { return (inside_ & (1 << corner)) != 0; }
  // The row of a corner; the first row of its level if it is outside.
  template <typename T>
  const T* row(int64_t corner, int64_t sample) const {
    return reinterpret_cast<const T*>(address_[corner][sample]);
  }

  // Call visit(address of the row, product of trilinear and attention weight) for all corners that are inside.
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
          visit(address_[c][i], products[c][i]);
        }
      } else {
        for (uint32_t left = static_cast<uint32_t>(inside[i]); left != 0; left &= left - 1) {
          const int c = std::countr_zero(left);
          visit(address_[c][i], products[c][i]);
        }
      }
    }
  }

 private:
  // What is the same for every query and head. Lanes without a sample have no voxel inside.
  const Sizes& sizes_;
  int64_t first_, count_;
  Vec<acc_t> size_[3] = {};
  Index last_[3] = {Index{} - 1, Index{} - 1, Index{} - 1}, row_step_[3] = {};

  // What is the same for the queries of a head, in bytes.
  alignas(64) int64_t level_address_[lanes], stride_[lanes], corner_step_[kCorners][lanes];

  // What differs.
  Vec<acc_t> weight_[3][2];
  Index inside_;  // bit c: corner c is inside
  alignas(64) int64_t address_[kCorners][lanes];
};

// All samples of a (query, head), and the rows that they read or add to.
template <typename acc_t>
struct Samples {
  std::vector<SampleBlock<acc_t>> blocks;

  explicit Samples(const Sizes& sizes) {
    for (int64_t first = 0; first < sizes.num_samples(); first += num_lanes<acc_t>) {
      blocks.emplace_back(sizes, first);
    }
  }
  void read_from(const std::vector<LevelRows>& levels) {
    for (auto& block : blocks) {
      block.read_from(levels);
    }
  }
  void place(const acc_t* locations) {
    for (auto& block : blocks) {
      block.place(locations + block.first() * 3);
    }
  }
};

// Call visit(item) for a range of items, after begin_head(first number of its rows) whenever another head begins.
template <typename BeginHead, typename Visit>
inline void for_items(int64_t begin, int64_t end, const Sizes& sizes, BeginHead begin_head, Visit visit) {
  for (int64_t index = begin; index < end; ++index) {
    const Item item(index, sizes);
    if (index == begin || index % sizes.queries == 0) {
      begin_head(item.image * sizes.rows * sizes.row_stride() + item.head * sizes.channels);
    }
    visit(item);
  }
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
    Samples<acc_t> samples(sizes);
    HeadRows<scalar_t> head(sizes, sizes.channels);
    const auto begin_head = [&](int64_t first) {
      head.read(rows + first);
      samples.read_from(head.levels(rows + first));
    };
    for_items(begin, end, sizes, begin_head, [&](const Item& item) {
      samples.place(location + item.first_sample * 3);
      for_channel_blocks<acc_t>(sizes.channels, [&](int64_t channel, auto vectors, int64_t last) {
        Vec<acc_t> sum[vectors.value] = {};
        for (const auto& block : samples.blocks) {
          block.for_each_corner(share + item.first_sample + block.first(), [&](int64_t address, acc_t weight) {
            const scalar_t* row = reinterpret_cast<const scalar_t*>(address) + channel;
            for (int64_t v = 0; v < vectors.value; ++v) {
              sum[v] += weight * load_some_lanes<acc_t>(row + v * lanes, last);
            }
          });
        }
        for (int64_t v = 0; v < vectors.value; ++v) {
          store_some_lanes<acc_t>(out + item.first_output + channel + v * lanes, sum[v], last);
        }
      });
    });
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
    Samples<acc_t> samples(sizes);
    HeadRows<scalar_t> head(sizes, sizes.channels);
    const auto begin_head = [&](int64_t first) {
      head.read(rows + first);
      samples.read_from(head.levels(rows + first));
    };
    for_items(begin, end, sizes, begin_head, [&](const Item& item) {
      samples.place(location + item.first_sample * 3);
      for (const auto& block : samples.blocks) {
        const int64_t first = item.first_sample + block.first();
        Vec<acc_t> products[kCorners] = {};
        for_channel_blocks<acc_t>(sizes.channels, [&](int64_t channel, auto vectors, int64_t last) {
          Vec<acc_t> grad_lanes[vectors.value];
          for (int64_t v = 0; v < vectors.value; ++v) {
            grad_lanes[v] = load_some_lanes<acc_t>(grads + item.first_output + channel + v * lanes, last);
          }
          for (int64_t c = 0; c < kCorners; ++c) {
            Vec<acc_t> square[lanes];  // row i holds the lanes of sample i's product
            for (int64_t i = 0; i < lanes; ++i) {
              const scalar_t* row = block.template row<scalar_t>(c, i) + channel;
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
    });
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
    Samples<acc_t> samples(sizes);
    HeadRows<scalar_t> dense(sizes, part);
    std::vector<acc_t> sums(is_exact ? 0 : sizes.rows * part);  // half types are rounded once, after the last query
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / num_parts / sizes.heads, head = unit / num_parts % sizes.heads;
      const int64_t first = unit % num_parts * part, channels = std::min(part, sizes.channels - first);
      if (channels <= 0) {
        continue;
      }
      scalar_t* const target = out + image * sizes.rows * sizes.row_stride() + head * sizes.channels + first;
      if constexpr (is_exact) {
        dense.clear();
        samples.read_from(dense.levels(target));
      } else {
        std::fill(sums.begin(), sums.end(), acc_t(0));
        std::vector<LevelRows> levels;
        for (const Level& level : sizes.levels) {
          levels.push_back({reinterpret_cast<int64_t>(sums.data() + level.start * part),
                            part * static_cast<int64_t>(sizeof(acc_t))});
        }
        samples.read_from(levels);
      }
      for (int64_t query = 0; query < sizes.queries; ++query) {
        const Item item(image, head, query, sizes);
        samples.place(location + item.first_sample * 3);
        for_channel_blocks<acc_t>(channels, [&](int64_t channel, auto vectors, int64_t last) {
          Vec<acc_t> grad_lanes[vectors.value];
          for (int64_t v = 0; v < vectors.value; ++v) {
            grad_lanes[v] = load_some_lanes<acc_t>(grads + item.first_output + first + channel + v * lanes, last);
          }
          for (const auto& block : samples.blocks) {
            block.for_each_corner(share + item.first_sample + block.first(), [&](int64_t address, acc_t weight) {
              for (int64_t v = 0; v < vectors.value; ++v) {
                acc_t* row = reinterpret_cast<acc_t*>(address) + channel + v * lanes;
                store_some_lanes<acc_t>(row, load_some_lanes<acc_t>(row, last) + weight * grad_lanes[v], last);
              }
            });
          }
        });
      }
      if constexpr (is_exact) {
        dense.write(target);
      } else {
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
