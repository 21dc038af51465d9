// Weights of one RoIAlign bin along one axis as a short list in shared memory, made by one warp.
//
// The samples of a bin that share a voxel are merged, so a voxel is read once. A list holds 16 samples; a bin with more
// of them is worked off list by list.
#pragma once

#include <cstdint>

#include "trilinear.h"

namespace seg3d {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kListSamples = kWarp / 2;

template <typename acc_t>
struct Tap {
  int64_t offset;  // of the voxel, in elements along this axis
  acc_t weight;
};

// One axis of a pooling: the volume's extent, the number of bins, voxels of the volume per voxel of a box. The bins of
// a box are fewer than 2^31, since dividing 64-bit numbers is slow.
struct PoolAxis {
  int64_t size;
  int out;
  double scale;
};

struct PoolGeometry {
  PoolAxis z, y, x;
  int64_t num_images;
  int64_t channels;
  int64_t num_boxes;
  int64_t sampling_ratio;
  bool aligned;
};

template <typename coord_t>
__device__ inline AxisBins<coord_t> pool_bins(const coord_t* box, int number, const PoolAxis& axis,
                                              const PoolGeometry& geometry) {
  return axis_bins<coord_t>(__ldg(box + number), __ldg(box + number + 3), static_cast<coord_t>(axis.scale), axis.out,
                            geometry.sampling_ratio, geometry.aligned);
}

// Only corners that are finite after scaling name a place; anything else would pool foreign voxels or none.
template <typename coord_t>
__device__ inline bool is_finite_box(const coord_t* box, const PoolGeometry& geometry) {
  bool finite = true;
  for (int corner = 0; corner < 6; corner += 3) {
    finite = finite && std::isfinite(product(__ldg(box + corner), static_cast<coord_t>(geometry.z.scale)));
    finite = finite && std::isfinite(product(__ldg(box + corner + 1), static_cast<coord_t>(geometry.y.scale)));
    finite = finite && std::isfinite(product(__ldg(box + corner + 2), static_cast<coord_t>(geometry.x.scale)));
  }
  return finite;
}

// touching_samples, cut off behind the axis: a bin that lies behind it has none.
template <typename coord_t>
__device__ inline SampleRun<coord_t> samples_on_axis(const AxisBins<coord_t>& bins, int64_t bin, int64_t size) {
  SampleRun<coord_t> run = touching_samples(bins, bin, size);
  if (bins.adaptive && run.count > 0) {
    const coord_t base = bins.start + product(coord_t(bin), bins.bin);
    const coord_t past =
        std::floor((coord_t(size) - base) / (bins.bin / bins.grid) - coord_t(0.5)) + coord_t(2) - run.first;
    if (!(past >= coord_t(run.count))) {
      run.count = past > coord_t(0) ? static_cast<int64_t>(past) : 0;
    }
  }
  return run;
}

// The number of lists that a bin on this axis can need.
template <typename coord_t>
__device__ inline int64_t num_lists(const AxisBins<coord_t>& bins, int64_t size) {
  const coord_t most = coord_t(2 * size + 8);
  const int64_t samples = static_cast<int64_t>(!bins.adaptive || bins.grid < most ? bins.grid : most);
  return (samples + kListSamples - 1) / kListSamples;
}

// Fill list `number` of a bin; the result is its length. All lanes of a warp call it together: a pair of lanes takes a
// sample, one its lower voxel and one its upper. The first lane that meets a voxel adds up all its weights.
template <typename coord_t, typename acc_t>
__device__ inline int fill_taps(const AxisBins<coord_t>& bins, int64_t bin, int64_t number, int64_t size,
                                int64_t stride, Tap<acc_t>* taps) {
  const int lane = threadIdx.x % kWarp;
  const int mine = lane / 2;
  const bool takes_high = lane % 2 == 1;
  const SampleRun<coord_t> run = samples_on_axis(bins, bin, size);
  const int64_t skipped = number * kListSamples;
  const int64_t left = run.count - skipped;
  const int count = left < kListSamples ? static_cast<int>(left) : kListSamples;
  const auto sample_at = [&](int i) {
    return clamped_sample(sample_position(bins, bin, run.first + static_cast<coord_t>(skipped + i)), size);
  };
  const auto touches = [](const AxisSample<coord_t>& sample, int64_t voxel) {
    return sample.inside && (sample.low == voxel || sample.high == voxel);
  };
  int64_t voxel = 0;
  coord_t weight = 0;
  if (mine < count) {
    AxisSample<coord_t> sample = sample_at(mine);
    voxel = takes_high ? sample.high : sample.low;
    bool is_first = sample.inside && !(takes_high && sample.high == sample.low);
    if (is_first && mine > 0) {
      is_first = !touches(sample_at(mine - 1), voxel);
    }
    for (int i = mine + 1; is_first && touches(sample, voxel); ++i) {
      weight += (sample.low == voxel ? sample.low_weight : coord_t(0)) +
                (sample.high == voxel ? sample.high_weight : coord_t(0));
      if (i >= count) {
        break;
      }
      sample = sample_at(i);
    }
  }
  const unsigned found = __ballot_sync(kAllLanes, weight != coord_t(0));
  if (weight != coord_t(0)) {
    taps[__popc(found & ((1u << lane) - 1))] = {voxel * stride, static_cast<acc_t>(weight / bins.grid)};
  }
  return __popc(found);
}

}  // namespace seg3d
