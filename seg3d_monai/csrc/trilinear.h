// Trilinear arithmetic shared by the kernels of every device.
//
// A trilinear weight is the product of one linear weight per axis, so everything here works on a single axis. The code
// knows nothing of tensors, threads or channels. It uses only arithmetic that exists on a host and on a device.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SEG3D_HOST_DEVICE __host__ __device__
#else
#define SEG3D_HOST_DEVICE
#endif

namespace seg3d {

// a * b, rounded for itself. A device compiler would otherwise merge it with a following sum, and a box at the edge of
// a bin count (ceil of its extent) could be cut otherwise on the device than on the host.
SEG3D_HOST_DEVICE inline float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

SEG3D_HOST_DEVICE inline double product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// The two voxels that a sample on one axis reads, and their weights. A sample that reads nothing has inside == false.
template <typename T>
struct AxisSample {
  int64_t low;
  int64_t high;
  T low_weight;
  T high_weight;
  bool inside;
};

// RoIAlign's border rule: outside [-1, size] a sample is zero, otherwise its position is clamped to [0, size - 1].
template <typename T>
SEG3D_HOST_DEVICE inline AxisSample<T> clamped_sample(T position, int64_t size) {
  if (!(position >= T(-1) && position <= T(size))) {
    return {0, 0, T(0), T(0), false};
  }
  if (position <= T(0)) {
    return {0, 0, T(1), T(0), true};
  }
  if (position >= T(size - 1)) {
    return {size - 1, size - 1, T(1), T(0), true};
  }
  const int64_t low = static_cast<int64_t>(position);
  const T fraction = position - T(low);
  return {low, low + 1, T(1) - fraction, fraction, true};
}

// The two voxels around a position on one axis, low and low + 1, each of which may lie outside and then counts as zero:
// grid_sample's rule for align_corners=False and padding_mode="zeros". Nothing is inside for NaN.
template <typename T>
struct PaddedSample {
  int64_t low;
  T low_weight;
  T high_weight;
  bool low_inside;
  bool high_inside;
};

template <typename T>
SEG3D_HOST_DEVICE inline PaddedSample<T> zero_padded_sample(T position, int64_t size) {
  if (!(position >= T(-1) && position < T(size))) {
    return {0, T(0), T(0), false, false};
  }
  const T floor = std::floor(position);
  const int64_t low = static_cast<int64_t>(floor);
  const T fraction = position - floor;
  return {low, T(1) - fraction, fraction, low >= 0, low + 1 < size};
}

// How a box is cut into bins, and a bin into samples, along one axis. `grid` is the number of samples a bin; it stays a
// floating number because a huge box with adaptive sampling may have more of them than an integer can count.
template <typename T>
struct AxisBins {
  T start;
  T bin;
  T grid;
  bool adaptive;
};

// The box's two corners on this axis are in input voxels; the bins are in voxels of the feature map.
template <typename T>
SEG3D_HOST_DEVICE inline AxisBins<T> axis_bins(T corner1, T corner2, T scale, int64_t out, int64_t sampling_ratio,
                                               bool aligned) {
  const T offset = aligned ? T(0.5) : T(0);
  const T start = product(corner1, scale) - offset;
  const T end = product(corner2, scale) - offset;
  T extent = end - start;
  if (!aligned && extent < T(1)) {
    extent = T(1);
  }
  const T bin = extent / T(out);
  if (sampling_ratio > 0) {
    return {start, bin, T(sampling_ratio), false};
  }
  const T grid = std::ceil(bin);
  return {start, bin, grid > T(0) ? grid : T(0), true};
}

// The run of a bin's samples that can touch the axis: samples first, first + 1, ... first + count - 1. With adaptive
// sampling neighbouring samples are at least half a voxel apart, so the run is bounded by the axis, not by the box.
template <typename T>
struct SampleRun {
  T first;
  int64_t count;
};

template <typename T>
SEG3D_HOST_DEVICE inline SampleRun<T> touching_samples(const AxisBins<T>& bins, int64_t bin_index, int64_t size) {
  if (!bins.adaptive) {
    return {T(0), static_cast<int64_t>(bins.grid)};
  }
  if (!(bins.grid > T(0))) {
    return {T(0), 0};
  }
  const T base = bins.start + product(T(bin_index), bins.bin);
  const T step = bins.bin / bins.grid;
  T first = std::floor((T(-1) - base) / step - T(0.5)) - T(1);
  first = first > T(0) ? first : T(0);
  first = first < bins.grid ? first : bins.grid;
  const T left = bins.grid - first;
  const int64_t longest = 2 * size + 8;
  return {first, left < T(longest) ? static_cast<int64_t>(left) : longest};
}

// Position of one sample. The order of the operations is part of the definition: every path computes the same bits.
template <typename T>
SEG3D_HOST_DEVICE inline T sample_position(const AxisBins<T>& bins, int64_t bin_index, T sample_index) {
  return bins.start + product(T(bin_index), bins.bin) + product(sample_index + T(0.5), bins.bin) / bins.grid;
}

}  // namespace seg3d
