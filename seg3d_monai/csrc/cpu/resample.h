// Separable resampling of a grid of voxels: one sparse matrix per axis, applied along z, then y, then x.
//
// A grid holds `L` numbers a voxel, side by side: L channels, which are resampled together, or one. Work for one output
// slab at a time keeps what is between the axes in the first-level cache. Cost per output voxel, in vectors of lanes:
// the weights of a row of x, plus those of y times (source / output) extent of x, plus those of z times both extents.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/lanes.h"

namespace seg3d {

// A sparse matrix along one axis. Row r is written to the voxel `target[r]` and sums the weights
// begin[r] .. begin[r + 1] of the source voxels `column`. `used` lists the source voxels of all rows, ascending.
template <typename acc_t>
struct AxisMatrix {
  std::vector<int64_t> target, begin, column, used;
  std::vector<acc_t> weight;

  int64_t num_rows() const { return static_cast<int64_t>(target.size()); }
  bool is_empty() const { return used.empty(); }
  int64_t first() const { return used.front(); }
  int64_t extent() const { return used.back() - used.front() + 1; }
};

// The matrix that takes the rows of `matrix` back to its columns.
template <typename acc_t>
AxisMatrix<acc_t> transposed(const AxisMatrix<acc_t>& matrix) {
  AxisMatrix<acc_t> result;
  result.target = matrix.used;
  if (matrix.is_empty()) {
    result.begin = {0};
    return result;
  }
  std::vector<int64_t> next(matrix.extent() + 1, 0);
  for (const int64_t column : matrix.column) {
    ++next[column - matrix.first() + 1];
  }
  result.begin.push_back(0);
  for (int64_t i = 0; i < matrix.extent(); ++i) {
    if (next[i + 1] > 0) {
      result.begin.push_back(result.begin.back() + next[i + 1]);
    }
    next[i + 1] += next[i];
  }
  result.column.resize(matrix.column.size());
  result.weight.resize(matrix.weight.size());
  for (int64_t row = 0; row < matrix.num_rows(); ++row) {
    if (matrix.begin[row] < matrix.begin[row + 1]) {
      result.used.push_back(matrix.target[row]);
    }
    for (int64_t t = matrix.begin[row]; t < matrix.begin[row + 1]; ++t) {
      const int64_t place = next[matrix.column[t] - matrix.first()]++;
      result.column[place] = matrix.target[row];
      result.weight[place] = matrix.weight[t];
    }
  }
  return result;
}

// Voxels in memory: `data` is the voxel `origin`, strides count numbers, and voxels follow each other along x.
template <typename T>
struct Grid {
  T* data;
  std::array<int64_t, 3> origin;
  int64_t z_stride, y_stride;

  template <int64_t L>
  T* row(int64_t z, int64_t y, int64_t x) const {
    return data + (z - origin[0]) * z_stride + (y - origin[1]) * y_stride + (x - origin[2]) * L;
  }
};

// sum[i] (+)= weight[0] * source[0][i] + ... over `count` sources, i < length.
template <int count, bool add, typename acc_t>
inline void weighted_sum_of(const acc_t* const* source, const acc_t* weight, acc_t* sum, int64_t length) {
  constexpr int64_t lanes = num_lanes<acc_t>;
  int64_t i = 0;
  for (; i + lanes <= length; i += lanes) {
    Vec<acc_t> value = weight[0] * load_lanes<acc_t>(source[0] + i);
    for (int t = 1; t < count; ++t) {
      value += weight[t] * load_lanes<acc_t>(source[t] + i);
    }
    store_lanes<acc_t>(sum + i, add ? load_lanes<acc_t>(sum + i) + value : value);
  }
  for (; i < length; ++i) {
    acc_t value = weight[0] * source[0][i];
    for (int t = 1; t < count; ++t) {
      value += weight[t] * source[t][i];
    }
    sum[i] = add ? sum[i] + value : value;
  }
}

// The same over any number of sources: up to four at a time stay in registers.
template <bool add = false, typename acc_t>
inline void weighted_sum(const acc_t* const* source, const acc_t* weight, int64_t count, acc_t* sum, int64_t length) {
  switch (count) {
    case 0:
      std::fill(sum, sum + (add ? 0 : length), acc_t(0));
      return;
    case 1:
      return weighted_sum_of<1, add>(source, weight, sum, length);
    case 2:
      return weighted_sum_of<2, add>(source, weight, sum, length);
    case 3:
      return weighted_sum_of<3, add>(source, weight, sum, length);
    case 4:
      return weighted_sum_of<4, add>(source, weight, sum, length);
    default:
      weighted_sum_of<4, add>(source, weight, sum, length);
      return weighted_sum<true>(source + 4, weight + 4, count - 4, sum, length);
  }
}

// Resample `source` into the target voxels of the three matrices: overwritten, or with `add` added to. after_slab(z) is
// called when the output slab z is complete.
template <int64_t L, bool add, typename acc_t, typename AfterSlab>
void resample(const Grid<const acc_t>& source, const std::array<AxisMatrix<acc_t>, 3>& axes, const Grid<acc_t>& target,
              AlignedBuffer<acc_t>& buffer, AfterSlab after_slab) {
  static_assert(L == 1 || L == num_lanes<acc_t>);
  const auto& [z, y, x] = axes;
  const int64_t width = x.extent() * L;
  acc_t* const plane = buffer.reserve((y.extent() + 1) * width);  // one row for each source row of y
  acc_t* const line = plane + y.extent() * width;
  std::vector<const acc_t*> sources;
  for (int64_t p = 0; p < z.num_rows(); ++p) {
    for (const int64_t row : y.used) {
      sources.clear();
      for (int64_t t = z.begin[p]; t < z.begin[p + 1]; ++t) {
        sources.push_back(source.template row<L>(z.column[t], row, x.first()));
      }
      weighted_sum(sources.data(), z.weight.data() + z.begin[p], z.begin[p + 1] - z.begin[p],
                   plane + (row - y.first()) * width, width);
    }
    for (int64_t q = 0; q < y.num_rows(); ++q) {
      sources.clear();
      for (int64_t t = y.begin[q]; t < y.begin[q + 1]; ++t) {
        sources.push_back(plane + (y.column[t] - y.first()) * width);
      }
      weighted_sum(sources.data(), y.weight.data() + y.begin[q], y.begin[q + 1] - y.begin[q], line, width);
      acc_t* const out = target.template row<L>(z.target[p], y.target[q], 0);
      for (int64_t r = 0; r < x.num_rows(); ++r) {
        using Unit = std::conditional_t<L == 1, acc_t, Vec<acc_t>>;
        Unit value = {};
        for (int64_t t = x.begin[r]; t < x.begin[r + 1]; ++t) {
          Unit voxel;
          std::memcpy(&voxel, line + (x.column[t] - x.first()) * L, sizeof(Unit));
          value += x.weight[t] * voxel;
        }
        acc_t* const place = out + x.target[r] * L;
        if constexpr (add) {
          Unit before;
          std::memcpy(&before, place, sizeof(Unit));
          value += before;
        }
        std::memcpy(place, &value, sizeof(Unit));
      }
    }
    after_slab(z.target[p]);
  }
}

}  // namespace seg3d
