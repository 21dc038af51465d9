// Voxel masks of detections on the CPU: each grid of logits, which spans its box, is interpolated at the centres of the
// voxels in the box and compared with a cut.
//
// A trilinear value is linear on one axis after the other: two planes of the grid are merged for a plane of voxels, two
// rows of that for a row of voxels, and a voxel reads two numbers. Cost: one plane of the grid for each plane of the
// box, and a few operations a voxel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

namespace seg3d {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kFarthest = 1e15;  // where neighbouring voxels are still apart in float64

// The voxels of an axis whose centres lie in the half-open box, counted from the box's first voxel, and the two bins
// around each of them, the same one twice at a border of the grid.
template <typename T>
struct Axis {
  struct Tap {
    int64_t low, high;
    T low_weight, high_weight;
  };
  int64_t first;
  std::vector<Tap> taps;

  void find(double start, double stop, int64_t bins) {
    const double origin = std::ceil(start - 0.5);
    const int64_t count = static_cast<int64_t>(std::ceil(stop - 0.5) - origin);
    const double bins_per_voxel = static_cast<double>(bins) / std::max(stop - start, 1e-6);
    first = static_cast<int64_t>(origin - std::floor(start));
    taps.resize(std::max<int64_t>(count, 0));
    for (int64_t i = 0; i < count; ++i) {
      const double centre = origin + static_cast<double>(i) + 0.5 - start;
      const double position = std::clamp(centre * bins_per_voxel - 0.5, 0.0, static_cast<double>(bins - 1));
      const double low = std::floor(position);
      const int64_t bin = static_cast<int64_t>(low);
      taps[i] = {bin, std::min(bin + 1, bins - 1), static_cast<T>(low + 1 - position), static_cast<T>(position - low)};
    }
  }
};

template <typename T>
void merge(const T* low, const T* high, T low_weight, T high_weight, int64_t count, T* result) {
  for (int64_t i = 0; i < count; ++i) {
    result[i] = low_weight * low[i] + high_weight * high[i];
  }
}

template <typename T>
class Paster {
 public:
  explicit Paster(T cut) : cut_(cut) {}

  // Writes the mask over all voxels that the box touches, (depth, height, width) of them.
  void paste(const T* grid, const int64_t* bins, const double* box, const std::array<int64_t, 3>& size, bool* mask) {
    std::fill(mask, mask + size[0] * size[1] * size[2], false);
    z_.find(box[0], box[3], bins[0]);
    y_.find(box[1], box[4], bins[1]);
    x_.find(box[2], box[5], bins[2]);
    const int64_t width = bins[2], area = bins[1] * width;
    plane_.resize(area);
    row_.resize(width);
    for (size_t i = 0; i < z_.taps.size(); ++i) {
      const auto& z = z_.taps[i];
      merge(grid + z.low * area, grid + z.high * area, z.low_weight, z.high_weight, area, plane_.data());
      for (size_t j = 0; j < y_.taps.size(); ++j) {
        const auto& y = y_.taps[j];
        const T* plane = plane_.data();
        merge(plane + y.low * width, plane + y.high * width, y.low_weight, y.high_weight, width, row_.data());
        bool* out = mask + ((z_.first + i) * size[1] + y_.first + j) * size[2] + x_.first;
        for (const auto& x : x_.taps) {
          *out++ = x.low_weight * row_[x.low] + x.high_weight * row_[x.high] > cut_;
        }
      }
    }
  }

 private:
  T cut_;
  Axis<T> z_, y_, x_;
  std::vector<T> plane_, row_;
};

// Where the grids and the masks of all detections begin, and their ends.
struct Layout {
  std::vector<int64_t> grids{0}, masks{0};
  std::vector<std::array<int64_t, 3>> sizes;
};

Layout lay_out(const int64_t* bins, const double* boxes, int64_t count, int64_t* rois) {
  Layout layout;
  for (int64_t i = 0; i < count; ++i, bins += 3, boxes += 6, rois += 6) {
    std::array<int64_t, 3> size;
    for (int axis = 0; axis < 3; ++axis) {
      const double low = boxes[axis], high = boxes[axis + 3];
      STD_TORCH_CHECK(bins[axis] > 0, "paste_masks3d: a grid has no bin on an axis");
      STD_TORCH_CHECK(-kFarthest < low && low <= high && high < kFarthest,
                      "paste_masks3d: a box is not finite, far outside, or its corners are swapped");
      rois[axis] = static_cast<int64_t>(std::floor(low));
      rois[axis + 3] = static_cast<int64_t>(std::ceil(high));
      size[axis] = rois[axis + 3] - rois[axis];
    }
    layout.sizes.push_back(size);
    layout.grids.push_back(layout.grids.back() + bins[0] * bins[1] * bins[2]);
    layout.masks.push_back(layout.masks.back() + size[0] * size[1] * size[2]);
  }
  return layout;
}

template <typename T>
void paste_all(const Tensor& logits, const int64_t* bins, const double* boxes, const Layout& layout, double cut,
               bool* masks) {
  const T* grids = logits.const_data_ptr<T>();
  torch::stable::parallel_for(0, static_cast<int64_t>(layout.sizes.size()), 16, [&](int64_t begin, int64_t end) {
    Paster<T> paster(static_cast<T>(cut));
    for (int64_t i = begin; i < end; ++i) {
      paster.paste(grids + layout.grids[i], bins + 3 * i, boxes + 6 * i, layout.sizes[i], masks + layout.masks[i]);
    }
  });
}

std::tuple<Tensor, Tensor> paste_masks3d(const Tensor& logits, const Tensor& sizes, const Tensor& boxes, double cut) {
  const bool is_double = logits.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(logits.dim() == 1 && logits.is_cpu() && (is_double || logits.scalar_type() == ScalarType::Float),
                  "paste_masks3d: logits must be float32 or float64 [L], on the CPU");
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 6 && boxes.is_cpu() && boxes.scalar_type() == ScalarType::Double,
                  "paste_masks3d: boxes must be float64 [N, 6], on the CPU");
  STD_TORCH_CHECK(sizes.dim() == 2 && sizes.size(0) == boxes.size(0) && sizes.size(1) == 3 && sizes.is_cpu() &&
                      sizes.scalar_type() == ScalarType::Long,
                  "paste_masks3d: sizes must be int64 [N, 3], on the CPU");
  const Tensor grids = torch::stable::contiguous(logits), bins = torch::stable::contiguous(sizes);
  const Tensor corners = torch::stable::contiguous(boxes);
  Tensor rois = torch::stable::new_empty(bins, {boxes.size(0), 6});
  const Layout layout = lay_out(bins.const_data_ptr<int64_t>(), corners.const_data_ptr<double>(), boxes.size(0),
                                rois.mutable_data_ptr<int64_t>());
  STD_TORCH_CHECK(layout.grids.back() == logits.size(0), "paste_masks3d: sizes do not add up to the logits");
  Tensor masks = torch::stable::new_empty(bins, {layout.masks.back()}, ScalarType::Bool);
  const auto paste = is_double ? paste_all<double> : paste_all<float>;
  paste(grids, bins.const_data_ptr<int64_t>(), corners.const_data_ptr<double>(), layout, cut,
        masks.mutable_data_ptr<bool>());
  return {rois, masks};
}

}  // namespace
}  // namespace seg3d

STABLE_TORCH_LIBRARY_IMPL(seg3d, CPU, m) {
  m.impl("paste_masks3d", TORCH_BOX(&seg3d::paste_masks3d));
}
