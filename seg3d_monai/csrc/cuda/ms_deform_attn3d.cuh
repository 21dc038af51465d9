// The kernels of multi-scale deformable attention in 3D, forward and backward.
//
// A group of lanes, as many as a row of channels needs, takes one query and head. First each lane places a sample of
// its own; then, sample after sample, all lanes of the group read the rows of the corners, neighbouring channels by
// neighbouring lanes. In the backward pass a corner's row gets one atomic sum a lane; the gradients of a sample's
// location and weight are dot products, summed over the group without atomics.
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

// Where a sample lies: its lowest corner as an offset into the value, which of the corners (bits z, y, x) are inside,
// the weight of the upper corner on each axis, and the attention.
template <typename acc_t>
struct DeformSample {
  int64_t lowest;
  unsigned inside;
  acc_t z, y, x;
  acc_t attention;
};

template <typename acc_t>
__device__ inline DeformSample<acc_t> deform_sample(const acc_t* location, const acc_t* attention, int level,
                                                    const AttendGeometry& geometry, int64_t stride) {
  const auto on_axis = [](acc_t fraction, int64_t size) {
    return zero_padded_sample(product(fraction, acc_t(size)) - acc_t(0.5), size);
  };
  const auto z = on_axis(__ldg(location), geometry.depth[level]);
  const auto y = on_axis(__ldg(location + 1), geometry.height[level]);
  const auto x = on_axis(__ldg(location + 2), geometry.width[level]);
  const int64_t row = (z.low * geometry.height[level] + y.low) * geometry.width[level] + x.low;
  const unsigned by_z = (z.low_inside ? 0x0fu : 0u) | (z.high_inside ? 0xf0u : 0u);
  const unsigned by_y = (y.low_inside ? 0x33u : 0u) | (y.high_inside ? 0xccu : 0u);
  const unsigned by_x = (x.low_inside ? 0x55u : 0u) | (x.high_inside ? 0xaau : 0u);
  return {(geometry.start[level] + row) * stride,
          by_z & by_y & by_x,
          z.high_weight,
          y.high_weight,
          x.high_weight,
          __ldg(attention)};
}

// The sample that lane `source` of the group holds. By all lanes of a warp.
template <typename acc_t>
__device__ inline DeformSample<acc_t> from_lane(const DeformSample<acc_t>& sample, int source, int group) {
  const auto take = [&](auto value) { return __shfl_sync(0xffffffffu, value, source, group); };
  return {take(sample.lowest), take(sample.inside), take(sample.z),
          take(sample.y),      take(sample.x),      take(sample.attention)};
}

// Call `visit(offset, corner, z, y, x)` for the corners that lie inside: the offset of the corner's row, and the
// corner's weight on each axis.
template <typename acc_t, typename Visit>
__device__ inline void for_each_corner(const DeformSample<acc_t>& sample, int level, const AttendGeometry& geometry,
                                       int64_t stride, Visit visit) {
  const int64_t line = geometry.width[level] * stride, slice = geometry.height[level] * line;
#pragma unroll
  for (int corner = 0; corner < 8; ++corner) {
    if (sample.inside >> corner & 1) {
      const bool z = corner & 4, y = corner & 2, x = corner & 1;
      visit(sample.lowest + (z ? slice : 0) + (y ? line : 0) + (x ? stride : 0), corner, z ? sample.z : 1 - sample.z,
            y ? sample.y : 1 - sample.y, x ? sample.x : 1 - sample.x);
    }
  }
}

// What a group of lanes works on. Groups without a row take part in the warp's operations, with samples that read
// nothing.
struct AttendRow {
  int64_t number;        // of the query and head, and of its row in the output
  int64_t first_sample;  // its place among all samples
  int64_t offset;        // of its image and head in the value
  bool exists;
};

__device__ inline AttendRow attend_row(int64_t first, const AttendGeometry& geometry, int64_t stride) {
  const int64_t number = first + threadIdx.x / geometry.group;
  const int64_t query = number / geometry.heads, head = number - query * geometry.heads;
  return {number, number * (geometry.levels * geometry.points),
          query / geometry.num_queries * geometry.num_values * stride + head * geometry.channels,
          number < geometry.num_images * geometry.num_queries * geometry.heads};
}

// This lane's own sample, the `mine`-th of its row.
template <typename acc_t>
__device__ inline DeformSample<acc_t> own_sample(const AttendRow& row, int mine, const acc_t* locations,
                                                 const acc_t* attention, const AttendGeometry& geometry,
                                                 int64_t stride) {
  if (!row.exists || mine >= geometry.levels * geometry.points) {
    return {0, 0, 0, 0, 0, 0};
  }
  const int64_t sample = row.first_sample + mine;
  return deform_sample(locations + sample * 3, attention + sample, mine / geometry.points, geometry, stride);
}

// value [N, S, M, Dh], locations [N, Lq, M, L, P, 3], weights [N, Lq, M, L, P], output [N, Lq, M, Dh].
template <int width, typename scalar_t>
__global__ void __launch_bounds__(kAttendThreads, 1)
    attend(const scalar_t* __restrict__ value, const accumulate_t<scalar_t>* __restrict__ locations,
           const accumulate_t<scalar_t>* __restrict__ weights, const __grid_constant__ AttendGeometry geometry,
           scalar_t* output) {
  using acc_t = accumulate_t<scalar_t>;
  const int group = geometry.group, lane = threadIdx.x % group, groups = kAttendThreads / group;
  const int num_samples = geometry.levels * geometry.points;
  const int64_t stride = int64_t(geometry.heads) * geometry.channels;
  const int64_t num_rows = geometry.num_images * geometry.num_queries * geometry.heads;
  for (int64_t first = int64_t(blockIdx.x) * groups; first < num_rows; first += int64_t(gridDim.x) * groups) {
    const AttendRow row = attend_row(first, geometry, stride);
    for (int first_channel = 0; first_channel < geometry.channels; first_channel += group * width) {
      const int channel = first_channel + lane * width;
      const bool has_channel = row.exists && channel < geometry.channels;
      const scalar_t* values = value + row.offset + channel;
      acc_t sum[width] = {};
      for (int first_sample = 0; first_sample < num_samples; first_sample += group) {
        const auto own = own_sample(row, first_sample + lane, locations, weights, geometry, stride);
        for (int i = 0; i < group && first_sample + i < num_samples; ++i) {
          const auto sample = from_lane(own, i, group);
          if (!has_channel) {
            continue;
          }
          const int level = (first_sample + i) / geometry.points;
          for_each_corner(sample, level, geometry, stride, [&](int64_t offset, int, acc_t z, acc_t y, acc_t x) {
            acc_t corner[width];
            load_row<width>(values + offset, corner);
            const acc_t share = sample.attention * z * y * x;
#pragma unroll
            for (int j = 0; j < width; ++j) {
              sum[j] += share * corner[j];
            }
          });
        }
      }
      if (has_channel) {
        store_row<width>(output + row.number * geometry.channels + channel, sum);
      }
    }
  }
}

// grad [N, Lq, M, Dh] is summed into grad_value [N, S, M, Dh], which starts as zero; grad_locations and grad_weights
// are written whole.
template <int width, typename scalar_t>
__global__ void __launch_bounds__(kAttendThreads, 1)
    attend_backward(const scalar_t* __restrict__ grad, const scalar_t* __restrict__ value,
                    const accumulate_t<scalar_t>* __restrict__ locations,
                    const accumulate_t<scalar_t>* __restrict__ weights, const __grid_constant__ AttendGeometry geometry,
                    accumulate_t<scalar_t>* grad_value, accumulate_t<scalar_t>* grad_locations,
                    accumulate_t<scalar_t>* grad_weights) {
  using acc_t = accumulate_t<scalar_t>;
  const int group = geometry.group, lane = threadIdx.x % group, groups = kAttendThreads / group;
  const int num_samples = geometry.levels * geometry.points;
  const int64_t stride = int64_t(geometry.heads) * geometry.channels;
  const int64_t num_rows = geometry.num_images * geometry.num_queries * geometry.heads;
  for (int64_t first = int64_t(blockIdx.x) * groups; first < num_rows; first += int64_t(gridDim.x) * groups) {
    const AttendRow row = attend_row(first, geometry, stride);
    const int end = row.exists ? geometry.channels : 0;
    for (int first_sample = 0; first_sample < num_samples; first_sample += group) {
      const auto own = own_sample(row, first_sample + lane, locations, weights, geometry, stride);
      // The gradients of this lane's sample: of its attention, and of its position on each axis.
      acc_t own_attention = 0, own_z = 0, own_y = 0, own_x = 0;
      for (int i = 0; i < group && first_sample + i < num_samples; ++i) {
        const auto sample = from_lane(own, i, group);
        const int level = (first_sample + i) / geometry.points;
        acc_t by_attention = 0, by_z = 0, by_y = 0, by_x = 0;
        for (int channel = lane * width; channel < end; channel += group * width) {
          acc_t grads[width];
          load_row<width>(grad + row.number * geometry.channels + channel, grads);
          const int64_t first_value = row.offset + channel;
          for_each_corner(sample, level, geometry, stride, [&](int64_t offset, int number, acc_t z, acc_t y, acc_t x) {
            acc_t corner[width];
            load_row<width>(value + first_value + offset, corner);
            acc_t dot = 0;
#pragma unroll
            for (int j = 0; j < width; ++j) {
              dot += grads[j] * corner[j];
            }
            by_attention += z * y * x * dot;
            by_z += (number & 4 ? y * x : -y * x) * dot;
            by_y += (number & 2 ? z * x : -z * x) * dot;
            by_x += (number & 1 ? z * y : -z * y) * dot;
            add_row<width>(grad_value + first_value + offset, sample.attention * z * y * x, grads);
          });
        }
        for (int step = group / 2; step > 0; step /= 2) {
          by_attention += __shfl_xor_sync(0xffffffffu, by_attention, step);
          by_z += __shfl_xor_sync(0xffffffffu, by_z, step);
          by_y += __shfl_xor_sync(0xffffffffu, by_y, step);
          by_x += __shfl_xor_sync(0xffffffffu, by_x, step);
        }
        if (i == lane) {
          own_attention = by_attention;
          own_z = by_z * sample.attention * acc_t(geometry.depth[level]);
          own_y = by_y * sample.attention * acc_t(geometry.height[level]);
          own_x = by_x * sample.attention * acc_t(geometry.width[level]);
        }
      }
      if (row.exists && first_sample + lane < num_samples) {
        const int64_t number = row.first_sample + first_sample + lane;
        __stcs(grad_weights + number, own_attention);
        __stcs(grad_locations + number * 3, own_z);
        __stcs(grad_locations + number * 3 + 1, own_y);
        __stcs(grad_locations + number * 3 + 2, own_x);
      }
    }
  }
}

}  // namespace seg3d
