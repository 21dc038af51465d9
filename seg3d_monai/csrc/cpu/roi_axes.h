// The matrices of RoIAlign: per box and axis, which voxels each bin reads and with what weights.
//
// A sample's trilinear weight is a product over the axes, and the samples of a bin form a grid, so the mean of a bin is
// three one-dimensional weighted sums. The border rules live in the matrices, and nothing after them knows of samples.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "cpu/resample.h"
#include "trilinear.h"

namespace seg3d {

struct RoiGeometry {
  std::array<int64_t, 3> size;  // of the feature map: depth, height, width
  std::array<int64_t, 3> out;
  std::array<double, 3> scale;
  int64_t sampling_ratio;
  bool aligned;

  int64_t num_voxels() const { return size[0] * size[1] * size[2]; }
  int64_t num_bins() const { return out[0] * out[1] * out[2]; }
};

// Row b holds the weights of bin b. Cost: the samples of the box along the axis, or twice the axis if that is less.
template <typename coord_t, typename acc_t>
AxisMatrix<acc_t> roi_axis_matrix(coord_t corner1, coord_t corner2, const RoiGeometry& geometry, int axis) {
  const int64_t size = geometry.size[axis], out = geometry.out[axis];
  const AxisBins<coord_t> bins = axis_bins<coord_t>(corner1, corner2, static_cast<coord_t>(geometry.scale[axis]), out,
                                                    geometry.sampling_ratio, geometry.aligned);
  AxisMatrix<acc_t> matrix;
  matrix.begin.push_back(0);
  std::vector<coord_t> row;  // weights of the voxels low .. low + row.size() that a bin reads
  for (int64_t b = 0; b < out; ++b) {
    matrix.target.push_back(b);
    const SampleRun<coord_t> run = touching_samples(bins, b, size);
    int64_t low = 0;
    row.clear();
    for (int64_t i = 0; i < run.count; ++i) {
      // Positions of a bin go up, or down in an inverted box with a fixed sampling ratio.
      const coord_t position = sample_position(bins, b, run.first + static_cast<coord_t>(i));
      const AxisSample<coord_t> sample = clamped_sample(position, size);
      if (!sample.inside) {
        continue;
      }
      if (row.empty()) {
        low = sample.low;
      } else if (sample.low < low) {
        row.insert(row.begin(), low - sample.low, coord_t(0));
        low = sample.low;
      }
      row.resize(std::max<size_t>(row.size(), sample.high - low + 1), coord_t(0));
      row[sample.low - low] += sample.low_weight;
      row[sample.high - low] += sample.high_weight;
    }
    for (size_t v = 0; v < row.size(); ++v) {
      if (row[v] != coord_t(0)) {
        matrix.column.push_back(low + static_cast<int64_t>(v));
        matrix.weight.push_back(static_cast<acc_t>(row[v] / bins.grid));
      }
    }
    matrix.begin.push_back(static_cast<int64_t>(matrix.column.size()));
  }
  matrix.used = matrix.column;
  std::sort(matrix.used.begin(), matrix.used.end());
  matrix.used.erase(std::unique(matrix.used.begin(), matrix.used.end()), matrix.used.end());
  return matrix;
}

// The voxels low .. high (exclusive) of the feature map.
struct Window {
  std::array<int64_t, 3> low, high;

  std::array<int64_t, 3> extent() const { return {high[0] - low[0], high[1] - low[1], high[2] - low[2]}; }
  int64_t num_voxels() const { return extent()[0] * extent()[1] * extent()[2]; }
};

inline Window united(const Window& a, const Window& b) {
  Window both;
  for (int axis = 0; axis < 3; ++axis) {
    both.low[axis] = std::min(a.low[axis], b.low[axis]);
    both.high[axis] = std::max(a.high[axis], b.high[axis]);
  }
  return both;
}

template <typename acc_t>
struct RoiMatrices {
  std::array<AxisMatrix<acc_t>, 3> axes;

  // No voxel is read: the box's output is zero.
  bool is_empty() const { return axes[0].is_empty() || axes[1].is_empty() || axes[2].is_empty(); }

  Window window() const {
    Window window;
    for (int axis = 0; axis < 3; ++axis) {
      window.low[axis] = axes[axis].used.front();
      window.high[axis] = axes[axis].used.back() + 1;
    }
    return window;
  }
};

}  // namespace seg3d
