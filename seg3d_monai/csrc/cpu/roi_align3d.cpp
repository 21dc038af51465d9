// RoIAlign in 3D on the CPU, forward and backward.
//
// The samples of a box form a grid, and trilinear weights are products, so the mean of a bin is three one-dimensional
// weighted sums. Each box's weights are made once per axis (AxisTaps) and used for all channels: first along z over
// whole rows of x, which the compiler vectorises, then along y, then along x. The backward pass runs the same sums the
// other way. It owns one (image, channel) volume per thread and adds the boxes in their order, so its bits do not
// depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "trilinear.h"

namespace seg3d {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename scalar_t>
using accumulate_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

struct Geometry {
  std::array<int64_t, 3> size;  // of the feature map: depth, height, width
  std::array<int64_t, 3> out;
  std::array<double, 3> scale;
  int64_t sampling_ratio;
  bool aligned;
};

// Weights of one box along one axis: bin b reads the taps begin[b] .. begin[b + 1]. A tap names a voxel by its place
// in `voxels`, the ascending list of the voxels that any bin reads.
template <typename acc_t>
struct AxisTaps {
  std::vector<int64_t> voxels;
  std::vector<int64_t> begin;
  std::vector<int64_t> place;
  std::vector<acc_t> weight;

  int64_t num_voxels() const { return static_cast<int64_t>(voxels.size()); }
};

template <typename coord_t, typename acc_t>
AxisTaps<acc_t> make_taps(coord_t corner1, coord_t corner2, const Geometry& geometry, int axis) {
  const int64_t size = geometry.size[axis];
  const int64_t out = geometry.out[axis];
  const AxisBins<coord_t> bins = axis_bins<coord_t>(corner1, corner2, static_cast<coord_t>(geometry.scale[axis]), out,
                                                    geometry.sampling_ratio, geometry.aligned);
  AxisTaps<acc_t> taps;
  taps.begin.assign(out + 1, 0);
  std::vector<coord_t> row(size, coord_t(0));
  std::vector<int64_t> first_touched(out, size), last_touched(out, -1);
  std::vector<char> is_read(size, 0);
  for (int64_t b = 0; b < out; ++b) {
    const SampleRun<coord_t> run = touching_samples(bins, b, size);
    for (int64_t i = 0; i < run.count; ++i) {
      const coord_t position = sample_position(bins, b, run.first + static_cast<coord_t>(i));
      const AxisSample<coord_t> sample = clamped_sample(position, size);
      if (!sample.inside) {
        continue;
      }
      row[sample.low] += sample.low_weight;
      row[sample.high] += sample.high_weight;
      first_touched[b] = std::min(first_touched[b], sample.low);
      last_touched[b] = std::max(last_touched[b], sample.high);
    }
    for (int64_t v = first_touched[b]; v <= last_touched[b]; ++v) {
      if (row[v] != coord_t(0)) {
        taps.place.push_back(v);
        taps.weight.push_back(static_cast<acc_t>(row[v] / bins.grid));
        is_read[v] = 1;
        row[v] = coord_t(0);
      }
    }
    taps.begin[b + 1] = static_cast<int64_t>(taps.place.size());
  }
  std::vector<int64_t> place_of(size, -1);
  for (int64_t v = 0; v < size; ++v) {
    if (is_read[v]) {
      place_of[v] = taps.num_voxels();
      taps.voxels.push_back(v);
    }
  }
  for (int64_t& place : taps.place) {
    place = place_of[place];
  }
  return taps;
}

template <typename acc_t>
struct BoxTaps {
  AxisTaps<acc_t> z, y, x;
  bool empty;       // no voxel is read: the box's output is zero
  int64_t x_first;  // rows are read from here on, x_extent voxels long
  int64_t x_extent;
};

template <typename coord_t, typename box_t, typename acc_t>
std::vector<BoxTaps<acc_t>> make_all_taps(const box_t* boxes, int64_t num_boxes, const Geometry& geometry) {
  // An exception thrown on another thread would lose its message.
  for (int64_t i = 0; i < num_boxes * 6; ++i) {
    STD_TORCH_CHECK(std::isfinite(static_cast<coord_t>(boxes[i]) * static_cast<coord_t>(geometry.scale[i % 3])),
                    "roi_align3d: boxes must be finite after scaling; remove boxes with NaN or infinite corners");
  }
  std::vector<BoxTaps<acc_t>> all(num_boxes);
  torch::stable::parallel_for(0, num_boxes, 16, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const box_t* box = boxes + k * 6;
      BoxTaps<acc_t>& taps = all[k];
      taps.z = make_taps<coord_t, acc_t>(static_cast<coord_t>(box[0]), static_cast<coord_t>(box[3]), geometry, 0);
      taps.y = make_taps<coord_t, acc_t>(static_cast<coord_t>(box[1]), static_cast<coord_t>(box[4]), geometry, 1);
      taps.x = make_taps<coord_t, acc_t>(static_cast<coord_t>(box[2]), static_cast<coord_t>(box[5]), geometry, 2);
      taps.empty = taps.z.voxels.empty() || taps.y.voxels.empty() || taps.x.voxels.empty();
      taps.x_first = taps.empty ? 0 : taps.x.voxels.front();
      taps.x_extent = taps.empty ? 0 : taps.x.voxels.back() - taps.x_first + 1;
    }
  });
  return all;
}

// Coordinates are float64 as soon as the boxes or the features are.
template <typename scalar_t>
std::vector<BoxTaps<accumulate_t<scalar_t>>> taps_of(const Tensor& boxes, const Geometry& geometry) {
  using acc_t = accumulate_t<scalar_t>;
  if (boxes.scalar_type() == ScalarType::Double) {
    return make_all_taps<double, double, acc_t>(boxes.const_data_ptr<double>(), boxes.size(0), geometry);
  }
  using coord_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
  return make_all_taps<coord_t, float, acc_t>(boxes.const_data_ptr<float>(), boxes.size(0), geometry);
}

template <typename in_t, typename acc_t>
inline void add_scaled(acc_t* __restrict__ sum, const in_t* __restrict__ row, acc_t weight, int64_t length) {
  for (int64_t i = 0; i < length; ++i) {
    sum[i] += weight * static_cast<acc_t>(row[i]);
  }
}

template <typename scalar_t>
void pool_channel(const scalar_t* volume, const BoxTaps<accumulate_t<scalar_t>>& taps, const Geometry& geometry,
                  std::vector<accumulate_t<scalar_t>>& plane, std::vector<accumulate_t<scalar_t>>& line,
                  scalar_t* out) {
  using acc_t = accumulate_t<scalar_t>;
  const auto [out_d, out_h, out_w] = geometry.out;
  if (taps.empty) {
    std::fill(out, out + out_d * out_h * out_w, static_cast<scalar_t>(0.0f));
    return;
  }
  const int64_t height = geometry.size[1], width = geometry.size[2];
  const int64_t rows = taps.y.num_voxels(), extent = taps.x_extent;
  for (int64_t p = 0; p < out_d; ++p) {
    plane.assign(rows * extent, acc_t(0));
    for (int64_t t = taps.z.begin[p]; t < taps.z.begin[p + 1]; ++t) {
      const scalar_t* slice = volume + taps.z.voxels[taps.z.place[t]] * height * width + taps.x_first;
      for (int64_t s = 0; s < rows; ++s) {
        add_scaled(plane.data() + s * extent, slice + taps.y.voxels[s] * width, taps.z.weight[t], extent);
      }
    }
    for (int64_t q = 0; q < out_h; ++q) {
      line.assign(extent, acc_t(0));
      for (int64_t t = taps.y.begin[q]; t < taps.y.begin[q + 1]; ++t) {
        add_scaled(line.data(), plane.data() + taps.y.place[t] * extent, taps.y.weight[t], extent);
      }
      for (int64_t r = 0; r < out_w; ++r) {
        acc_t sum = acc_t(0);
        for (int64_t t = taps.x.begin[r]; t < taps.x.begin[r + 1]; ++t) {
          sum += taps.x.weight[t] * line[taps.x.voxels[taps.x.place[t]] - taps.x_first];
        }
        *out++ = static_cast<scalar_t>(sum);
      }
    }
  }
}

template <typename scalar_t>
void unpool_channel(const scalar_t* grad, const BoxTaps<accumulate_t<scalar_t>>& taps, const Geometry& geometry,
                    std::vector<accumulate_t<scalar_t>>& plane, std::vector<accumulate_t<scalar_t>>& line,
                    accumulate_t<scalar_t>* volume) {
  using acc_t = accumulate_t<scalar_t>;
  if (taps.empty) {
    return;
  }
  const auto [out_d, out_h, out_w] = geometry.out;
  const int64_t height = geometry.size[1], width = geometry.size[2];
  const int64_t rows = taps.y.num_voxels(), extent = taps.x_extent;
  for (int64_t p = 0; p < out_d; ++p) {
    plane.assign(rows * extent, acc_t(0));
    for (int64_t q = 0; q < out_h; ++q) {
      line.assign(extent, acc_t(0));
      for (int64_t r = 0; r < out_w; ++r) {
        const acc_t value = static_cast<acc_t>(*grad++);
        for (int64_t t = taps.x.begin[r]; t < taps.x.begin[r + 1]; ++t) {
          line[taps.x.voxels[taps.x.place[t]] - taps.x_first] += taps.x.weight[t] * value;
        }
      }
      for (int64_t t = taps.y.begin[q]; t < taps.y.begin[q + 1]; ++t) {
        add_scaled(plane.data() + taps.y.place[t] * extent, line.data(), taps.y.weight[t], extent);
      }
    }
    for (int64_t t = taps.z.begin[p]; t < taps.z.begin[p + 1]; ++t) {
      acc_t* slice = volume + taps.z.voxels[taps.z.place[t]] * height * width + taps.x_first;
      for (int64_t s = 0; s < rows; ++s) {
        add_scaled(slice + taps.y.voxels[s] * width, plane.data() + s * extent, taps.z.weight[t], extent);
      }
    }
  }
}

template <typename scalar_t>
void forward(const Tensor& features, const Tensor& boxes, const Tensor& batch_index, const Geometry& geometry,
             Tensor& output) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t channels = features.size(1);
  const int64_t volume = geometry.size[0] * geometry.size[1] * geometry.size[2];
  const int64_t bins = geometry.out[0] * geometry.out[1] * geometry.out[2];
  const scalar_t* input = features.const_data_ptr<scalar_t>();
  const int64_t* image = batch_index.const_data_ptr<int64_t>();
  scalar_t* out = output.mutable_data_ptr<scalar_t>();
  const auto taps = taps_of<scalar_t>(boxes, geometry);
  const int64_t grain = std::max<int64_t>(1, 16384 / bins);
  torch::stable::parallel_for(0, boxes.size(0) * channels, grain, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> plane, line;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t k = item / channels, c = item % channels;
      pool_channel(input + (image[k] * channels + c) * volume, taps[k], geometry, plane, line, out + item * bins);
    }
  });
}

template <typename scalar_t>
void backward(const Tensor& grad, const Tensor& boxes, const Tensor& batch_index, const Geometry& geometry,
              Tensor& grad_features) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t num_images = grad_features.size(0), channels = grad.size(1);
  const int64_t volume = geometry.size[0] * geometry.size[1] * geometry.size[2];
  const int64_t bins = geometry.out[0] * geometry.out[1] * geometry.out[2];
  const scalar_t* input = grad.const_data_ptr<scalar_t>();
  const int64_t* image = batch_index.const_data_ptr<int64_t>();
  scalar_t* out = grad_features.mutable_data_ptr<scalar_t>();
  const auto taps = taps_of<scalar_t>(boxes, geometry);
  std::vector<std::vector<int64_t>> boxes_of(num_images);
  for (int64_t k = 0; k < boxes.size(0); ++k) {
    boxes_of[image[k]].push_back(k);
  }
  torch::stable::parallel_for(0, num_images * channels, 1, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> plane, line, sums;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / channels, c = item % channels;
      scalar_t* target = out + item * volume;
      acc_t* accumulator;
      if constexpr (std::is_same_v<scalar_t, acc_t>) {
        std::fill(target, target + volume, acc_t(0));
        accumulator = target;
      } else {
        sums.assign(volume, acc_t(0));
        accumulator = sums.data();
      }
      for (const int64_t k : boxes_of[n]) {
        unpool_channel(input + (k * channels + c) * bins, taps[k], geometry, plane, line, accumulator);
      }
      if constexpr (!std::is_same_v<scalar_t, acc_t>) {
        for (int64_t v = 0; v < volume; ++v) {
          target[v] = static_cast<scalar_t>(sums[v]);
        }
      }
    }
  });
}

// Python checks these too, with kinder words; here they keep a direct call of the operator from reading foreign memory.
void check_arguments(const Tensor& volumes, const Tensor& boxes, const Tensor& batch_index, int64_t num_images,
                     const Geometry& geometry) {
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
      STD_TORCH_CHECK(false, "roi_align3d: features must be float64, float32, bfloat16 or float16");
  }
}

Tensor roi_align3d(const Tensor& features, const Tensor& boxes, const Tensor& batch_index, int64_t out_d, int64_t out_h,
                   int64_t out_w, double scale_z, double scale_y, double scale_x, int64_t sampling_ratio,
                   bool aligned) {
  STD_TORCH_CHECK(features.dim() == 5, "roi_align3d: features must have the shape [N, C, D, H, W]");
  const Geometry geometry{{features.size(2), features.size(3), features.size(4)},
                          {out_d, out_h, out_w},
                          {scale_z, scale_y, scale_x},
                          sampling_ratio,
                          aligned};
  const Tensor input = torch::stable::contiguous(features);
  const Tensor box_rows = torch::stable::contiguous(boxes);
  const Tensor image = torch::stable::contiguous(batch_index);
  check_arguments(input, box_rows, image, features.size(0), geometry);
  Tensor output = torch::stable::new_empty(features, {boxes.size(0), features.size(1), out_d, out_h, out_w});
  dispatch(features.scalar_type(),
           [&](auto zero) { forward<decltype(zero)>(input, box_rows, image, geometry, output); });
  return output;
}

Tensor roi_align3d_backward(const Tensor& grad, const Tensor& boxes, const Tensor& batch_index, int64_t batch,
                            int64_t depth, int64_t height, int64_t width, double scale_z, double scale_y,
                            double scale_x, int64_t sampling_ratio, bool aligned) {
  STD_TORCH_CHECK(grad.dim() == 5 && grad.size(0) == boxes.size(0),
                  "roi_align3d_backward: grad must have the shape [K, C, d, h, w], K = the number of boxes");
  const Geometry geometry{{depth, height, width},
                          {grad.size(2), grad.size(3), grad.size(4)},
                          {scale_z, scale_y, scale_x},
                          sampling_ratio,
                          aligned};
  const Tensor grad_rows = torch::stable::contiguous(grad);
  const Tensor box_rows = torch::stable::contiguous(boxes);
  const Tensor image = torch::stable::contiguous(batch_index);
  check_arguments(grad_rows, box_rows, image, batch, geometry);
  Tensor grad_features = torch::stable::new_empty(grad, {batch, grad.size(1), depth, height, width});
  dispatch(grad.scalar_type(),
           [&](auto zero) { backward<decltype(zero)>(grad_rows, box_rows, image, geometry, grad_features); });
  return grad_features;
}

}  // namespace
}  // namespace seg3d

STABLE_TORCH_LIBRARY_IMPL(seg3d, CPU, m) {
  m.impl("roi_align3d", TORCH_BOX(&seg3d::roi_align3d));
  m.impl("roi_align3d_backward", TORCH_BOX(&seg3d::roi_align3d_backward));
}
