// The kernels of multi-scale deformable attention in 3D, forward and backward.
//
// A group of lanes, as many as a row of channels needs, takes one query and head. Each sample reads the eight rows of
// its corners, neighbouring channels by neighbouring lanes. In the backward pass a corner's row gets one atomic sum a
// lane; the gradients of the sample's location and weight are dot products, summed over the group without atomics.
#pragma once

#include <cstdint>

#include "trilinear.h"
#include "vector_access.cuh"

namespace seg3d {

constexpr int kMaxLevels = 16;
constexpr int kAttendThreads = 128;

struct AttendGeometry {
  int64_t num_images, num_queries, num_values;
  int heads, channels, levels, points;
  int group;  // lanes that share a query and head: a power of two, at most a warp
  int64_t start[kMaxLevels];
  int64_t depth[kMaxLevels], height[kMaxLevels], width[kMaxLevels];
};

// One sample: on each axis the two voxels and their weights, and the first row of its level.
template <typename coord_t>
struct DeformSample {
  AxisSample<coord_t> z, y, x;
  bool inside;
};

template <typename coord_t>
__device__ inline DeformSample<coord_t> deform_sample(const coord_t* location, int level,
                                                      const AttendGeometry& geometry) {
  const auto on_axis = [](coord_t fraction, int64_t size) {
    return zero_padded_sample(product(fraction, coord_t(size)) - coord_t(0.5), size);
  };
  DeformSample<coord_t> sample;
  sample.z = on_axis(__ldg(location), geometry.depth[level]);
  sample.y = on_axis(__ldg(location + 1), geometry.height[level]);
  sample.x = on_axis(__ldg(location + 2), geometry.width[level]);
  sample.inside = sample.z.inside && sample.y.inside && sample.x.inside;
  return sample;
}

// The derivative of a corner's weight by the position: -1 and 1, but 0 for a corner outside. zero_padded_sample puts
// the index of such a corner onto the other one.
template <typename coord_t>
__device__ inline int slope(const AxisSample<coord_t>& sample, bool is_high) {
  if (sample.low != sample.high) {
    return is_high ? 1 : -1;
  }
  const bool has_low = sample.low_weight > coord_t(0);
  return is_high ? !has_low : -has_low;
}

// Call `visit(offset, z, y, x)` for the eight corners of a sample: where the corner's row lies, rows being `stride`
// elements apart, and whether it is the upper one on each axis.
template <typename coord_t, typename Visit>
__device__ inline void for_each_corner(const DeformSample<coord_t>& sample, int level, const AttendGeometry& geometry,
                                       int64_t stride, Visit visit) {
  const int64_t line = geometry.width[level] * stride, slice = geometry.height[level] * line;
  const int64_t lowest =
      geometry.start[level] * stride + sample.z.low * slice + sample.y.low * line + sample.x.low * stride;
  const int64_t z_step = sample.z.high != sample.z.low ? slice : 0, y_step = sample.y.high != sample.y.low ? line : 0,
                x_step = sample.x.high != sample.x.low ? stride : 0;
#pragma unroll
  for (int corner = 0; corner < 8; ++corner) {
    const bool z = corner & 4, y = corner & 2, x = corner & 1;
    visit(lowest + (z ? z_step : 0) + (y ? y_step : 0) + (x ? x_step : 0), z, y, x);
  }
}

template <typename coord_t>
__device__ inline coord_t weight_of(const AxisSample<coord_t>& sample, bool is_high) {
  return is_high ? sample.high_weight : sample.low_weight;
}

// value [N, S, M, Dh], locations [N, Lq, M, L, P, 3], weights [N, Lq, M, L, P], output [N, Lq, M, Dh].
template <int width, typename scalar_t, typename coord_t>
__global__ void __launch_bounds__(kAttendThreads, 1)
    attend(const scalar_t* __restrict__ value, const coord_t* __restrict__ locations,
           const accumulate_t<scalar_t>* __restrict__ weights, const __grid_constant__ AttendGeometry geometry,
           scalar_t* output) {
  using acc_t = accumulate_t<scalar_t>;
  const int lane = threadIdx.x % geometry.group, groups = kAttendThreads / geometry.group;
  const int64_t stride = int64_t(geometry.heads) * geometry.channels;
  const int64_t num_rows = geometry.num_images * geometry.num_queries * geometry.heads;
  for (int64_t row = int64_t(blockIdx.x) * groups + threadIdx.x / geometry.group; row < num_rows;
       row += int64_t(gridDim.x) * groups) {
    const int64_t query = row / geometry.heads;
    const int head = static_cast<int>(row - query * geometry.heads);
    const scalar_t* values =
        value + query / geometry.num_queries * geometry.num_values * stride + int64_t(head) * geometry.channels;
    for (int channel = lane * width; channel < geometry.channels; channel += geometry.group * width) {
      acc_t sum[width] = {};
      int64_t number = row * (geometry.levels * geometry.points);
      for (int level = 0; level < geometry.levels; ++level) {
        for (int point = 0; point < geometry.points; ++point, ++number) {
          const auto sample = deform_sample(locations + number * 3, level, geometry);
          if (!sample.inside) {
            continue;
          }
          const acc_t weight = __ldg(weights + number);
          for_each_corner(sample, level, geometry, stride, [&](int64_t corner_offset, bool z, bool y, bool x) {
            acc_t corner[width];
            load_row<width>(values + corner_offset + channel, corner);
            const acc_t share =
                weight * static_cast<acc_t>(weight_of(sample.z, z) * weight_of(sample.y, y) * weight_of(sample.x, x));
#pragma unroll
            for (int i = 0; i < width; ++i) {
              sum[i] += share * corner[i];
            }
          });
        }
      }
      store_row<width>(output + row * geometry.channels + channel, sum);
    }
  }
}

// grad [N, Lq, M, Dh] is summed into grad_value [N, S, M, Dh], which starts as zero; grad_locations and grad_weights
// are written whole.
template <int width, typename scalar_t, typename coord_t>
__global__ void __launch_bounds__(kAttendThreads, 1)
    attend_backward(const scalar_t* __restrict__ grad, const scalar_t* __restrict__ value,
                    const coord_t* __restrict__ locations, const accumulate_t<scalar_t>* __restrict__ weights,
                    const __grid_constant__ AttendGeometry geometry, accumulate_t<scalar_t>* grad_value,
                    coord_t* grad_locations, accumulate_t<scalar_t>* grad_weights) {
  using acc_t = accumulate_t<scalar_t>;
  const int lane = threadIdx.x % geometry.group, groups = kAttendThreads / geometry.group;
  const int64_t stride = int64_t(geometry.heads) * geometry.channels;
  const int64_t num_rows = geometry.num_images * geometry.num_queries * geometry.heads;
  // All groups of a warp take as many turns, since they meet in the shuffles.
  for (int64_t first = int64_t(blockIdx.x) * groups; first < num_rows; first += int64_t(gridDim.x) * groups) {
    const int64_t row = first + threadIdx.x / geometry.group;
    const bool has_row = row < num_rows;
    const int64_t query = has_row ? row / geometry.heads : 0;
    const int64_t offset = query / geometry.num_queries * geometry.num_values * stride +
                           (has_row ? row - query * geometry.heads : 0) * geometry.channels;
    int64_t number = has_row ? row * (geometry.levels * geometry.points) : 0;
    for (int level = 0; level < geometry.levels; ++level) {
      for (int point = 0; point < geometry.points; ++point, ++number) {
        const auto sample = deform_sample(locations + number * 3, level, geometry);
        const acc_t weight = __ldg(weights + number);
        // The gradient of the weight, and of the position on each axis.
        acc_t by_weight = 0, by_z = 0, by_y = 0, by_x = 0;
        const int end = has_row && sample.inside ? geometry.channels : 0;
        for (int channel = lane * width; channel < end; channel += geometry.group * width) {
          acc_t grads[width];
          load_row<width>(grad + row * geometry.channels + channel, grads);
          for_each_corner(sample, level, geometry, stride, [&](int64_t corner_offset, bool z, bool y, bool x) {
            acc_t corner[width];
            load_row<width>(value + offset + corner_offset + channel, corner);
            acc_t dot = 0;
#pragma unroll
            for (int i = 0; i < width; ++i) {
              dot += grads[i] * corner[i];
            }
            const acc_t z_weight = static_cast<acc_t>(weight_of(sample.z, z)),
                        y_weight = static_cast<acc_t>(weight_of(sample.y, y)),
                        x_weight = static_cast<acc_t>(weight_of(sample.x, x));
            const acc_t share = z_weight * y_weight * x_weight;
            by_weight += share * dot;
            by_z += slope(sample.z, z) * y_weight * x_weight * dot;
            by_y += slope(sample.y, y) * z_weight * x_weight * dot;
            by_x += slope(sample.x, x) * z_weight * y_weight * dot;
            if (share != acc_t(0)) {
              add_row<width>(grad_value + offset + corner_offset + channel, weight * share, grads);
            }
          });
        }
        for (int step = geometry.group / 2; step > 0; step /= 2) {
          by_weight += __shfl_xor_sync(0xffffffffu, by_weight, step);
          by_z += __shfl_xor_sync(0xffffffffu, by_z, step);
          by_y += __shfl_xor_sync(0xffffffffu, by_y, step);
          by_x += __shfl_xor_sync(0xffffffffu, by_x, step);
        }
        if (has_row && lane == 0) {
          __stcs(grad_weights + number, by_weight);
          __stcs(grad_locations + number * 3, static_cast<coord_t>(weight * by_z) * coord_t(geometry.depth[level]));
          __stcs(grad_locations + number * 3 + 1,
                 static_cast<coord_t>(weight * by_y) * coord_t(geometry.height[level]));
          __stcs(grad_locations + number * 3 + 2, static_cast<coord_t>(weight * by_x) * coord_t(geometry.width[level]));
        }
      }
    }
  }
}

}  // namespace seg3d
