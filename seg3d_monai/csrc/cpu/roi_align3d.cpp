// RoIAlign in 3D on the CPU, forward and backward.
//
// Each box's mean of samples is a separable resampling (roi_axes.h, resample.h), and the backward pass is the same
// resampling with the transposed matrices. Channels lie beside each other in the arithmetic, one a lane, whatever the
// layout of the features: the window that a group of neighbouring boxes reads is gathered once per block of channels,
// small enough to stay in the second-level cache. Cost per box and channel, e, o, t = extent in voxels, bins, and
// weights a bin of each axis: about o t e^2 + o^2 t e + o^3 t sums, against 8 o^3 s^3 for s samples a bin and axis.
//
// The backward pass gives each (image, block of channels) to one thread, which adds the boxes in a fixed order: its
// bits do not depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "channels_last.h"
#include "cpu/huge_pages.h"
#include "cpu/lanes.h"
#include "cpu/resample.h"
#include "cpu/roi_axes.h"
#include "dispatch.h"

namespace seg3d {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor [N, C, D, H, W] whose rows of x, or whose channels, lie side by side.
template <typename T>
struct Volumes {
  T* data;
  int64_t image_stride, channel_stride, z_stride, y_stride, x_stride;

  T* at(int64_t image, int64_t channel, int64_t z, int64_t y, int64_t x) const {
    return data + image * image_stride + channel * channel_stride + z * z_stride + y * y_stride + x * x_stride;
  }
};

template <typename T>
Volumes<T> volumes_of(const Tensor& tensor) {
  T* data;
  if constexpr (std::is_const_v<T>) {
    data = tensor.const_data_ptr<std::remove_const_t<T>>();
  } else {
    data = tensor.mutable_data_ptr<T>();
  }
  return {data, tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3), tensor.stride(4)};
}

// Boxes of one image whose windows lie close together. Without channels beside each other a group is one box.
struct Group {
  int64_t image;
  std::vector<int64_t> boxes;
  Window window;
};

// A window of this many voxels by one vector of channels takes four megabytes.
constexpr int64_t kWindowVoxels = 65536;

template <typename acc_t>
std::vector<Group> group_boxes(const std::vector<RoiMatrices<acc_t>>& matrices, const RoiGeometry& geometry,
                               const int64_t* image, int64_t most_boxes, int64_t most_voxels) {
  std::vector<Window> windows(matrices.size());
  std::vector<int64_t> order;
  for (size_t k = 0; k < matrices.size(); ++k) {
    if (!matrices[k].is_empty()) {
      windows[k] = matrices[k].window();
      order.push_back(static_cast<int64_t>(k));
    }
  }
  // Along the longest axis the windows of neighbours unite to the smallest ones.
  const auto longest = std::max_element(geometry.size.begin(), geometry.size.end()) - geometry.size.begin();
  const auto place = [&](int64_t k) {
    return std::array<int64_t, 2>{image[k], windows[k].low[longest] + windows[k].high[longest]};
  };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return place(a) < place(b); });
  std::vector<Group> groups;
  for (const int64_t k : order) {
    if (!groups.empty() && groups.back().image == image[k] &&
        static_cast<int64_t>(groups.back().boxes.size()) < most_boxes) {
      const Window both = united(groups.back().window, windows[k]);
      if (both.num_voxels() <= most_voxels) {
        groups.back().window = both;
        groups.back().boxes.push_back(k);
        continue;
      }
    }
    groups.push_back({image[k], {k}, windows[k]});
  }
  return groups;
}

// Copy a row of `extent` voxels of `channels` <= L channels to voxels of L numbers; missing channels become zero.
template <int64_t L, typename scalar_t, typename acc_t>
void gather_row(const scalar_t* source, int64_t channel_stride, int64_t x_stride, int64_t channels, int64_t extent,
                acc_t* target) {
  if constexpr (L == 1) {
    constexpr int64_t lanes = num_lanes<acc_t>;
    int64_t x = 0;
    for (; x_stride == 1 && x + lanes <= extent; x += lanes) {
      store_lanes<acc_t>(target + x, load_lanes<acc_t>(source + x));
    }
    for (; x < extent; ++x) {
      target[x] = static_cast<acc_t>(source[x * x_stride]);
    }
  } else if (channel_stride == 1) {
    for (int64_t x = 0; x < extent; ++x) {
      store_lanes<acc_t>(target + x * L, load_some_lanes<acc_t>(source + x * x_stride, channels));
    }
  } else {
    for (int64_t x = 0; x < extent; x += L) {
      const int64_t count = std::min(L, extent - x);
      Vec<acc_t> square[L] = {};
      for (int64_t c = 0; c < channels; ++c) {
        square[c] = load_some_lanes<acc_t>(source + c * channel_stride + x, count);
      }
      transpose<acc_t>(square);
      for (int64_t i = 0; i < count; ++i) {
        store_lanes<acc_t>(target + (x + i) * L, square[i]);
      }
    }
  }
}

// The way back: overwrite the row, or with `add` add to it.
template <int64_t L, bool add, typename scalar_t, typename acc_t>
void scatter_row(const acc_t* source, scalar_t* target, int64_t channel_stride, int64_t x_stride, int64_t channels,
                 int64_t extent) {
  const auto put = [](scalar_t* place, Vec<acc_t> lanes, int64_t count) {
    if constexpr (add) {
      lanes += load_some_lanes<acc_t>(place, count);
    }
    store_some_lanes<acc_t>(place, lanes, count);
  };
  if constexpr (L == 1) {
    int64_t x = 0;
    for (; x_stride == 1 && x + num_lanes<acc_t> <= extent; x += num_lanes<acc_t>) {
      put(target + x, load_lanes<acc_t>(source + x), num_lanes<acc_t>);
    }
    for (; x < extent; ++x) {
      const acc_t before = add ? static_cast<acc_t>(target[x * x_stride]) : acc_t(0);
      target[x * x_stride] = static_cast<scalar_t>(before + source[x]);
    }
  } else if (channel_stride == 1) {
    for (int64_t x = 0; x < extent; ++x) {
      put(target + x * x_stride, load_lanes<acc_t>(source + x * L), channels);
    }
  } else {
    for (int64_t x = 0; x < extent; x += L) {
      const int64_t count = std::min(L, extent - x);
      Vec<acc_t> square[L] = {};
      for (int64_t i = 0; i < count; ++i) {
        square[i] = load_lanes<acc_t>(source + (x + i) * L);
      }
      transpose<acc_t>(square);
      for (int64_t c = 0; c < channels; ++c) {
        put(target + c * channel_stride + x, square[c], count);
      }
    }
  }
}

template <typename coord_t, typename acc_t, typename box_t>
std::vector<RoiMatrices<acc_t>> make_matrices(const box_t* boxes, int64_t num_boxes, const RoiGeometry& geometry) {
  // An exception thrown on another thread would lose its message.
  for (int64_t i = 0; i < num_boxes * 6; ++i) {
    STD_TORCH_CHECK(std::isfinite(static_cast<coord_t>(boxes[i]) * static_cast<coord_t>(geometry.scale[i % 3])),
                    "roi_align3d: boxes must be finite after scaling; remove boxes with NaN or infinite corners");
  }
  std::vector<RoiMatrices<acc_t>> matrices(num_boxes);
  torch::stable::parallel_for(0, num_boxes, 16, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      for (int axis = 0; axis < 3; ++axis) {
        matrices[k].axes[axis] = roi_axis_matrix<coord_t, acc_t>(
            static_cast<coord_t>(boxes[k * 6 + axis]), static_cast<coord_t>(boxes[k * 6 + axis + 3]), geometry, axis);
      }
    }
  });
  return matrices;
}

// Coordinates are float64 as soon as the boxes or the features are.
template <typename scalar_t>
std::vector<RoiMatrices<accumulate_t<scalar_t>>> matrices_of(const Tensor& boxes, const RoiGeometry& geometry) {
  using acc_t = accumulate_t<scalar_t>;
  if (boxes.scalar_type() == ScalarType::Double) {
    return make_matrices<double, acc_t>(boxes.const_data_ptr<double>(), boxes.size(0), geometry);
  }
  using coord_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
  return make_matrices<coord_t, acc_t>(boxes.const_data_ptr<float>(), boxes.size(0), geometry);
}

// The voxels of a group's window, L channels beside each other. Only rows that a box reads hold anything.
template <int64_t L, typename acc_t>
class WindowBuffer {
 public:
  // Cover the window of `group` in a volume of `volume_width`.
  void cover(const Group& group, const std::vector<RoiMatrices<acc_t>>& matrices, int64_t volume_width) {
    window_ = group.window;
    // Whole vectors of voxels along x are faster to transpose.
    window_.high[2] = std::min(volume_width, window_.low[2] + (window_.extent()[2] + L - 1) / L * L);
    const auto [depth, height, width] = window_.extent();
    voxels_ = buffer_.reserve(depth * height * width * L);
    is_read_.assign(depth * height, 0);
    for (const int64_t k : group.boxes) {
      for (const int64_t z : matrices[k].axes[0].used) {
        for (const int64_t y : matrices[k].axes[1].used) {
          is_read_[(z - window_.low[0]) * height + y - window_.low[1]] = 1;
        }
      }
    }
  }

  // Call visit(z, y, row of the buffer) for the rows that are read.
  template <typename Visit>
  void for_each_row(Visit visit) const {
    const auto [depth, height, width] = window_.extent();
    for (int64_t row = 0; row < depth * height; ++row) {
      if (is_read_[row]) {
        visit(window_.low[0] + row / height, window_.low[1] + row % height, voxels_ + row * width * L);
      }
    }
  }

  template <typename T = acc_t>
  Grid<T> grid() const {
    const auto [depth, height, width] = window_.extent();
    return {voxels_, window_.low, height * width * L, width * L};
  }

  int64_t x_low() const { return window_.low[2]; }
  int64_t width() const { return window_.extent()[2]; }

 private:
  AlignedBuffer<acc_t> buffer_;
  acc_t* voxels_ = nullptr;
  std::vector<char> is_read_;
  Window window_ = {};
};

template <int64_t L, typename scalar_t>
void forward(const Tensor& features, const Tensor& boxes, const Tensor& batch_index, const RoiGeometry& geometry,
             Tensor& output) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t channels = features.size(1), num_blocks = (channels + L - 1) / L;
  const auto input = volumes_of<const scalar_t>(features);
  const auto pooled = volumes_of<scalar_t>(output);
  const auto matrices = matrices_of<scalar_t>(boxes, geometry);
  const int64_t num_boxes = boxes.size(0), item = channels * geometry.num_bins();
  for (int64_t k = 0; k < num_boxes; ++k) {
    if (matrices[k].is_empty()) {
      std::fill(pooled.data + k * item, pooled.data + (k + 1) * item, static_cast<scalar_t>(0.0f));
    }
  }
  // Enough groups to share among the threads; a group's result does not depend on who else is in it.
  const int64_t num_shares = 4 * torch::stable::get_num_threads() / std::max<int64_t>(num_blocks, 1) + 1;
  const auto groups = group_boxes(matrices, geometry, batch_index.const_data_ptr<int64_t>(),
                                  L == 1 ? 1 : (num_boxes + num_shares - 1) / num_shares, kWindowVoxels);
  const int64_t num_groups = static_cast<int64_t>(groups.size());
  // A single channel of the right type is read where it lies.
  const bool is_in_place = L == 1 && std::is_same_v<scalar_t, acc_t> && input.x_stride == 1;
  const auto [out_d, out_h, out_w] = geometry.out;
  const int64_t slab = out_h * out_w;
  torch::stable::parallel_for(0, num_groups * num_blocks, 1, [&](int64_t begin, int64_t end) {
    WindowBuffer<L, acc_t> window;
    AlignedBuffer<acc_t> tile_buffer, scratch;
    acc_t* const tile = tile_buffer.reserve(slab * L);
    for (int64_t unit = begin; unit < end; ++unit) {
      const Group& group = groups[unit % num_groups];
      const int64_t channel = unit / num_groups * L, count = std::min(L, channels - channel);
      Grid<const acc_t> source;
      if (is_in_place) {
        const void* volume = input.at(group.image, channel, 0, 0, 0);
        source = {static_cast<const acc_t*>(volume), {0, 0, 0}, input.z_stride, input.y_stride};
      } else {
        window.cover(group, matrices, geometry.size[2]);
        window.for_each_row([&](int64_t z, int64_t y, acc_t* row) {
          gather_row<L>(input.at(group.image, channel, z, y, window.x_low()), input.channel_stride, input.x_stride,
                        count, window.width(), row);
        });
        source = window.template grid<const acc_t>();
      }
      for (const int64_t k : group.boxes) {
        // All slabs of the output pass through one tile.
        resample<L, false>(source, matrices[k].axes, Grid<acc_t>{tile, {0, 0, 0}, 0, out_w * L}, scratch,
                           [&](int64_t p) {
                             scatter_row<L, false>(tile, pooled.at(k, channel, p, 0, 0), pooled.channel_stride,
                                                   pooled.x_stride, count, slab);
                           });
      }
    }
  });
}

template <int64_t L, typename scalar_t>
void backward(const Tensor& grad, const Tensor& boxes, const Tensor& batch_index, const RoiGeometry& geometry,
              Tensor& grad_features) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t num_images = grad_features.size(0), channels = grad.size(1), num_blocks = (channels + L - 1) / L;
  const auto pooled = volumes_of<const scalar_t>(grad);
  const auto output = volumes_of<scalar_t>(grad_features);
  const auto matrices = matrices_of<scalar_t>(boxes, geometry);
  // Half types are rounded once, so all boxes of an image go through one window.
  const bool is_exact = std::is_same_v<scalar_t, acc_t>;
  const auto groups =
      group_boxes(matrices, geometry, batch_index.const_data_ptr<int64_t>(), L == 1 && is_exact ? 1 : boxes.size(0),
                  is_exact ? kWindowVoxels : geometry.num_voxels());
  std::vector<std::vector<const Group*>> groups_of(num_images);
  for (const Group& group : groups) {
    groups_of[group.image].push_back(&group);
  }
  std::vector<std::array<AxisMatrix<acc_t>, 3>> transposed_axes(matrices.size());
  torch::stable::parallel_for(0, static_cast<int64_t>(matrices.size()), 16, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      for (int axis = 0; axis < 3; ++axis) {
        transposed_axes[k][axis] = transposed(matrices[k].axes[axis]);
      }
    }
  });
  const auto [out_d, out_h, out_w] = geometry.out;
  const int64_t num_bins = geometry.num_bins();
  torch::stable::parallel_for(0, num_images * num_blocks, 1, [&](int64_t begin, int64_t end) {
    WindowBuffer<L, acc_t> window;
    AlignedBuffer<acc_t> tile_buffer, scratch;
    acc_t* const tile = tile_buffer.reserve(num_bins * L);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t image = unit / num_blocks, channel = unit % num_blocks * L;
      const int64_t count = std::min(L, channels - channel);
      for (const Group* group : groups_of[image]) {
        window.cover(*group, matrices, geometry.size[2]);
        window.for_each_row([&](int64_t, int64_t, acc_t* row) { std::fill(row, row + window.width() * L, acc_t(0)); });
        for (const int64_t k : group->boxes) {
          for (int64_t p = 0; p < out_d; ++p) {
            gather_row<L>(pooled.at(k, channel, p, 0, 0), pooled.channel_stride, pooled.x_stride, count, out_h * out_w,
                          tile + p * out_h * out_w * L);
          }
          resample<L, true>(Grid<const acc_t>{tile, {0, 0, 0}, out_h * out_w * L, out_w * L}, transposed_axes[k],
                            window.grid(), scratch, [](int64_t) {});
        }
        window.for_each_row([&](int64_t z, int64_t y, const acc_t* row) {
          scatter_row<L, true>(row, output.at(image, channel, z, y, window.x_low()), output.channel_stride,
                               output.x_stride, count, window.width());
        });
      }
    }
  });
}

// Python checks these too, with kinder words; here they keep a direct call of the operator from reading foreign memory.
void check_arguments(const Tensor& volumes, const Tensor& boxes, const Tensor& batch_index, int64_t num_images,
                     const RoiGeometry& geometry) {
  STD_TORCH_CHECK(volumes.dim() == 5, "roi_align3d: expected a tensor [N, C, D, H, W], got ", volumes.dim(), " axes");
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 6, "roi_align3d: boxes must have the shape [K, 6]");
  STD_TORCH_CHECK(boxes.scalar_type() == ScalarType::Float || boxes.scalar_type() == ScalarType::Double,
                  "roi_align3d: boxes must be float32 or float64");
  STD_TORCH_CHECK(batch_index.dim() == 1 && batch_index.size(0) == boxes.size(0),
                  "roi_align3d: batch_index must have the shape [K], K = the number of boxes");
  STD_TORCH_CHECK(batch_index.scalar_type() == ScalarType::Long, "roi_align3d: batch_index must be int64");
  STD_TORCH_CHECK(volumes.is_cpu() && boxes.is_cpu() && batch_index.is_cpu(),
                  "roi_align3d: all tensors must be on the same device");
  for (int axis = 0; axis < 3; ++axis) {
    STD_TORCH_CHECK(geometry.size[axis] > 0 && geometry.out[axis] > 0,
                    "roi_align3d: the extents of the features and of the output must be positive");
  }
  const int64_t* image = batch_index.const_data_ptr<int64_t>();
  for (int64_t k = 0; k < boxes.size(0); ++k) {
    STD_TORCH_CHECK(image[k] >= 0 && image[k] < num_images, "roi_align3d: batch_index[", k, "] = ", image[k],
                    " is outside the batch of ", num_images, " images");
  }
}

// Call function(zero of the dtype, channels that are pooled together): a vector of them, unless they are few.
template <typename Function>
void dispatch(ScalarType dtype, int64_t channels, Function function) {
  dispatch_floating(dtype, "roi_align3d: features", [&](auto zero) {
    constexpr int64_t lanes = num_lanes<accumulate_t<decltype(zero)>>;
    if (channels < lanes / 4) {
      function(zero, std::integral_constant<int64_t, 1>{});
    } else {
      function(zero, std::integral_constant<int64_t, lanes>{});
    }
  });
}

// The tensor itself where the kernels can read it, else a contiguous copy.
Tensor readable(const Tensor& tensor) {
  return is_channels_last(tensor) || tensor.stride(4) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// An uninitialised tensor [count, channels, *size] like `like`, with its channels last in memory if asked for.
Tensor new_volumes(const Tensor& like, int64_t count, int64_t channels, const std::array<int64_t, 3>& size,
                   bool channels_last) {
  const auto [d, h, w] = size;
  if (!channels_last) {
    return torch::stable::new_empty(like, {count, channels, d, h, w});
  }
  Tensor volumes = torch::stable::new_empty(like, {count, d, h, w, channels});
  for (int64_t axis = 1; axis < 4; ++axis) {
    volumes = torch::stable::transpose(volumes, axis, 4);
  }
  return volumes;
}

Tensor roi_align3d(const Tensor& features, const Tensor& boxes, const Tensor& batch_index, int64_t out_d, int64_t out_h,
                   int64_t out_w, double scale_z, double scale_y, double scale_x, int64_t sampling_ratio,
                   bool aligned) {
  STD_TORCH_CHECK(features.dim() == 5, "roi_align3d: features must have the shape [N, C, D, H, W]");
  const RoiGeometry geometry{{features.size(2), features.size(3), features.size(4)},
                             {out_d, out_h, out_w},
                             {scale_z, scale_y, scale_x},
                             sampling_ratio,
                             aligned};
  const Tensor input = readable(features);
  const Tensor box_rows = torch::stable::contiguous(boxes);
  const Tensor image = torch::stable::contiguous(batch_index);
  check_arguments(input, box_rows, image, features.size(0), geometry);
  Tensor output = new_volumes(features, boxes.size(0), features.size(1), geometry.out, is_channels_last(features));
  advise_huge_pages(output);
  dispatch(features.scalar_type(), features.size(1), [&](auto zero, auto lanes) {
    forward<lanes.value, decltype(zero)>(input, box_rows, image, geometry, output);
  });
  return output;
}

Tensor roi_align3d_backward(const Tensor& grad, const Tensor& boxes, const Tensor& batch_index, int64_t batch,
                            int64_t depth, int64_t height, int64_t width, double scale_z, double scale_y,
                            double scale_x, int64_t sampling_ratio, bool aligned, bool channels_last) {
  STD_TORCH_CHECK(grad.dim() == 5 && grad.size(0) == boxes.size(0),
                  "roi_align3d_backward: grad must have the shape [K, C, d, h, w], K = the number of boxes");
  const RoiGeometry geometry{{depth, height, width},
                             {grad.size(2), grad.size(3), grad.size(4)},
                             {scale_z, scale_y, scale_x},
                             sampling_ratio,
                             aligned};
  // One row holds a slab of bins.
  const Tensor grad_rows = is_channels_last(grad) && grad.stride(3) == grad.stride(4) * grad.size(4)
                               ? grad
                               : torch::stable::contiguous(grad);
  const Tensor box_rows = torch::stable::contiguous(boxes);
  const Tensor image = torch::stable::contiguous(batch_index);
  check_arguments(grad_rows, box_rows, image, batch, geometry);
  Tensor grad_features = new_volumes(grad, batch, grad.size(1), geometry.size, channels_last);
  advise_huge_pages(grad_features);
  torch::stable::zero_(grad_features);
  dispatch(grad.scalar_type(), grad.size(1), [&](auto zero, auto lanes) {
    backward<lanes.value, decltype(zero)>(grad_rows, box_rows, image, geometry, grad_features);
  });
  return grad_features;
}

}  // namespace
}  // namespace seg3d

STABLE_TORCH_LIBRARY_IMPL(seg3d, CPU, m) {
  m.impl("roi_align3d", TORCH_BOX(&seg3d::roi_align3d));
  m.impl("roi_align3d_backward", TORCH_BOX(&seg3d::roi_align3d_backward));
}
