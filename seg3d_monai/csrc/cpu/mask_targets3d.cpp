// Mask targets of boxes on the CPU, looked up in a label volume.
//
// A trilinear sample is linear on one axis after the other. For a row of bins the four rows of voxels around it are
// merged first, at the voxels of the box only, which walks memory in order; then the bins read two merged voxels each.
// No mask of an instance is ever built.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

namespace seg3d {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kIgnored = -1;

// The two voxels around a bin's centre on one axis, the same one twice where it lies on a voxel.
struct Tap {
  int64_t low, high;
  float high_weight;
};

void find_taps(const float* box, int axis, int64_t bins, int64_t size, std::vector<Tap>& taps) {
  const float start = box[axis], extent = box[axis + 3] - start;
  taps.resize(bins);
  for (int64_t i = 0; i < bins; ++i) {
    const float step = (static_cast<float>(i) + 0.5f) / static_cast<float>(bins);
    const float position = start + extent * step - 0.5f;
    const float inside = position > 0 ? std::min(position, static_cast<float>(size - 1)) : 0;  // 0 for NaN
    const float low = std::floor(inside);
    taps[i] = {static_cast<int64_t>(low), static_cast<int64_t>(std::ceil(inside)), inside - low};
  }
}

float lerp(float low, float high, float weight) {
  return low + weight * (high - low);
}

struct Shape {
  int64_t depth, height, width;
  int64_t count() const { return depth * height * width; }
};

class Sampler {
 public:
  Sampler(const int64_t* label, Shape size, Shape bins) : label_(label), size_(size), bins_(bins) {}

  // Writes the bins of one box.
  void sample(const float* box, int64_t id, float* occupancy, bool* valid) {
    find_taps(box, 0, bins_.depth, size_.depth, z_);
    find_taps(box, 1, bins_.height, size_.height, y_);
    find_taps(box, 2, bins_.width, size_.width, x_);
    // A box may have its corners in either order.
    const auto [first, last] = std::minmax(x_.front().low, x_.back().low);
    const int64_t count = std::max({last, x_.front().high, x_.back().high}) - first + 1;
    share_.resize(count);
    ignored_.resize(count);
    for (const Tap& z : z_) {
      for (const Tap& y : y_) {
        merge_rows(z, y, id, first, count);
        for (const Tap& x : x_) {
          *occupancy++ = lerp(share_[x.low - first], share_[x.high - first], x.high_weight);
          *valid++ = !(ignored_[x.low - first] | ignored_[x.high - first]);
        }
      }
    }
  }

 private:
  const int64_t* label_;
  Shape size_, bins_;
  std::vector<Tap> z_, y_, x_;
  std::vector<float> share_;      // of the instance at the voxels of a row
  std::vector<uint8_t> ignored_;  // whether an ignored voxel takes part

  const int64_t* row(int64_t z, int64_t y, int64_t x) const {
    return label_ + (z * size_.height + y) * size_.width + x;
  }

  void merge_rows(const Tap& z, const Tap& y, int64_t id, int64_t first, int64_t count) {
    const int64_t *a = row(z.low, y.low, first), *b = row(z.high, y.low, first);
    const int64_t *c = row(z.low, y.high, first), *d = row(z.high, y.high, first);
    float* share = share_.data();
    uint8_t* ignored = ignored_.data();
    for (int64_t i = 0; i < count; ++i) {
      const float low = lerp(a[i] == id, b[i] == id, z.high_weight);
      const float high = lerp(c[i] == id, d[i] == id, z.high_weight);
      share[i] = lerp(low, high, y.high_weight);
      ignored[i] = (a[i] == kIgnored) | (b[i] == kIgnored) | (c[i] == kIgnored) | (d[i] == kIgnored);
    }
  }
};

std::tuple<Tensor, Tensor> mask_targets3d(const Tensor& label, const Tensor& ids, const Tensor& boxes, int64_t out_d,
                                          int64_t out_h, int64_t out_w) {
  STD_TORCH_CHECK(label.dim() == 3 && label.scalar_type() == ScalarType::Long && label.is_cpu(),
                  "mask_targets3d: label must be int64 [D, H, W]");
  const Shape size{label.size(0), label.size(1), label.size(2)}, bins{out_d, out_h, out_w};
  STD_TORCH_CHECK(size.count() > 0 && out_d > 0 && out_h > 0 && out_w > 0,
                  "mask_targets3d: the label volume and the grid must have a size of at least 1 on each axis");
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 6 && boxes.scalar_type() == ScalarType::Float && boxes.is_cpu(),
                  "mask_targets3d: boxes must be float32 [P, 6], on the device of label");
  STD_TORCH_CHECK(
      ids.dim() == 1 && ids.size(0) == boxes.size(0) && ids.scalar_type() == ScalarType::Long && ids.is_cpu(),
      "mask_targets3d: ids must be int64 [P], on the device of label");
  const Tensor voxels = torch::stable::contiguous(label), numbers = torch::stable::contiguous(ids);
  const Tensor corners = torch::stable::contiguous(boxes);
  const int64_t num_boxes = boxes.size(0);
  Tensor occupancy = torch::stable::new_empty(corners, {num_boxes, out_d, out_h, out_w});
  Tensor valid = torch::stable::new_empty(corners, {num_boxes, out_d, out_h, out_w}, ScalarType::Bool);
  const int64_t *all_voxels = voxels.const_data_ptr<int64_t>(), *all_ids = numbers.const_data_ptr<int64_t>();
  const float* all_corners = corners.const_data_ptr<float>();
  float* occupancy_out = occupancy.mutable_data_ptr<float>();
  bool* valid_out = valid.mutable_data_ptr<bool>();
  torch::stable::parallel_for(0, num_boxes, 4, [&](int64_t begin, int64_t end) {
    Sampler sampler(all_voxels, size, bins);
    for (int64_t i = begin; i < end; ++i) {
      sampler.sample(all_corners + 6 * i, all_ids[i], occupancy_out + i * bins.count(), valid_out + i * bins.count());
    }
  });
  return {occupancy, valid};
}

}  // namespace
}  // namespace seg3d

STABLE_TORCH_LIBRARY_IMPL(seg3d, CPU, m) {
  m.impl("mask_targets3d", TORCH_BOX(&seg3d::mask_targets3d));
}
