// Greedy non-maximum suppression of 3D boxes on the CPU, alone and within groups.
//
// Boxes are visited by descending score. A kept box can only suppress boxes of its own group whose interval on one axis
// meets its own, so the boxes are stored by (group, lower corner on that axis) and a kept box scans one run of them.
// Every IoU is taken in float64, whatever the dtype of the boxes.
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
#include <limits>
#include <numeric>
#include <vector>

namespace seg3d {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::vector<double> as_double(const Tensor& tensor, const char* name) {
  const Tensor values = torch::stable::contiguous(tensor);
  const int64_t count = values.numel();
  std::vector<double> result(count);
  const auto copy = [&](const auto* source) {
    for (int64_t i = 0; i < count; ++i) {
      result[i] = static_cast<double>(source[i]);
    }
  };
  switch (values.scalar_type()) {
    case ScalarType::Double:
      copy(values.const_data_ptr<double>());
      break;
    case ScalarType::Float:
      copy(values.const_data_ptr<float>());
      break;
    case ScalarType::BFloat16:
      copy(values.const_data_ptr<c10::BFloat16>());
      break;
    case ScalarType::Half:
      copy(values.const_data_ptr<c10::Half>());
      break;
    default:
      STD_TORCH_CHECK(false, "nms3d: ", name, " must be float64, float32, bfloat16 or float16");
  }
  return result;
}

// The axis on which boxes are shortest against their spread: the run that a kept box scans is shortest there.
int sweep_axis(const std::vector<double>& boxes, int64_t count) {
  int best = 0;
  double best_ratio = -1;
  for (int axis = 0; axis < 3; ++axis) {
    double low = std::numeric_limits<double>::infinity(), high = -low, extents = 0;
    for (int64_t i = 0; i < count; ++i) {
      low = std::min(low, boxes[i * 6 + axis]);
      high = std::max(high, boxes[i * 6 + axis + 3]);
      extents += std::max(0.0, boxes[i * 6 + axis + 3] - boxes[i * 6 + axis]);
    }
    const double ratio = (high - low) / std::max(extents, 1e-300);
    if (ratio > best_ratio) {
      best_ratio = ratio;
      best = axis;
    }
  }
  return best;
}

// Boxes by (group, lower corner on the sweep axis), as one array per coordinate: axis 0 is the sweep axis.
struct Sweep {
  std::array<std::vector<double>, 3> low, high;
  std::vector<double> volume;
  std::vector<int64_t> group_begin, group_end;  // of the box's group, as places
  std::vector<double> group_reach;              // the longest extent on the sweep axis in the box's group
  std::vector<int64_t> place;                   // of each box
};

Sweep make_sweep(const std::vector<double>& boxes, const int64_t* group, int64_t count) {
  const int axis = sweep_axis(boxes, count);
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), int64_t(0));
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    if (group != nullptr && group[a] != group[b]) {
      return group[a] < group[b];
    }
    const double low_a = boxes[a * 6 + axis], low_b = boxes[b * 6 + axis];
    return low_a != low_b ? low_a < low_b : a < b;
  });
  Sweep sweep;
  for (int i = 0; i < 3; ++i) {
    sweep.low[i].resize(count);
    sweep.high[i].resize(count);
  }
  sweep.volume.resize(count);
  sweep.group_begin.resize(count);
  sweep.group_end.resize(count);
  sweep.group_reach.resize(count);
  sweep.place.resize(count);
  for (int64_t at = 0; at < count; ++at) {
    const double* box = boxes.data() + order[at] * 6;
    double volume = 1;
    for (int i = 0; i < 3; ++i) {
      const int from = (axis + i) % 3;
      sweep.low[i][at] = box[from];
      sweep.high[i][at] = box[from + 3];
      volume *= std::max(0.0, box[from + 3] - box[from]);
    }
    sweep.volume[at] = volume;
    sweep.place[order[at]] = at;
  }
  for (int64_t begin = 0; begin < count;) {
    int64_t end = begin;
    double reach = 0;
    while (end < count && (group == nullptr || group[order[end]] == group[order[begin]])) {
      reach = std::max(reach, sweep.high[0][end] - sweep.low[0][end]);
      ++end;
    }
    std::fill(sweep.group_begin.begin() + begin, sweep.group_begin.begin() + end, begin);
    std::fill(sweep.group_end.begin() + begin, sweep.group_end.begin() + end, end);
    std::fill(sweep.group_reach.begin() + begin, sweep.group_reach.begin() + end, reach);
    begin = end;
  }
  return sweep;
}

std::vector<int64_t> suppress(const std::vector<double>& boxes, const std::vector<double>& scores, const int64_t* group,
                              int64_t count, double iou_threshold) {
  std::vector<int64_t> by_score(count);
  std::iota(by_score.begin(), by_score.end(), int64_t(0));
  std::stable_sort(by_score.begin(), by_score.end(), [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });

  const Sweep sweep = make_sweep(boxes, group, count);
  std::vector<char> done(count, 0);  // by place: visited or suppressed
  std::vector<int64_t> kept;
  for (const int64_t index : by_score) {
    const int64_t at = sweep.place[index];
    if (done[at]) {
      continue;
    }
    done[at] = 1;
    kept.push_back(index);
    if (!(sweep.volume[at] > 0)) {
      continue;
    }
    const auto lows = sweep.low[0].begin();
    const double low0 = sweep.low[0][at], high0 = sweep.high[0][at];
    const double low1 = sweep.low[1][at], high1 = sweep.high[1][at];
    const double low2 = sweep.low[2][at], high2 = sweep.high[2][at];
    const int64_t first =
        std::lower_bound(lows + sweep.group_begin[at], lows + at, low0 - sweep.group_reach[at]) - lows;
    const int64_t last = std::lower_bound(lows + at, lows + sweep.group_end[at], high0) - lows;
    for (int64_t other = first; other < last; ++other) {
      const double extent1 = std::min(high1, sweep.high[1][other]) - std::max(low1, sweep.low[1][other]);
      const double extent2 = std::min(high2, sweep.high[2][other]) - std::max(low2, sweep.low[2][other]);
      if (!(extent1 > 0) || !(extent2 > 0) || done[other]) {
        continue;
      }
      const double extent0 = std::min(high0, sweep.high[0][other]) - std::max(low0, sweep.low[0][other]);
      if (!(extent0 > 0)) {
        continue;
      }
      const double common = extent0 * extent1 * extent2;
      if (common / (sweep.volume[at] + sweep.volume[other] - common) > iou_threshold) {
        done[other] = 1;
      }
    }
  }
  return kept;
}

Tensor run(const Tensor& boxes, const Tensor& scores, const Tensor* group, double iou_threshold) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 6, "nms3d: boxes must have the shape [N, 6]");
  const int64_t count = boxes.size(0);
  STD_TORCH_CHECK(scores.dim() == 1 && scores.size(0) == count, "nms3d: scores must have the shape [N]");
  STD_TORCH_CHECK(boxes.is_cpu() && scores.is_cpu(), "nms3d: all tensors must be on the same device");
  const std::vector<double> box_values = as_double(boxes, "boxes");
  const std::vector<double> score_values = as_double(scores, "scores");
  for (const double value : box_values) {
    STD_TORCH_CHECK(std::isfinite(value), "nms3d: boxes must be finite; remove boxes with NaN or infinite corners");
  }
  for (const double value : score_values) {
    STD_TORCH_CHECK(!std::isnan(value), "nms3d: scores must not be NaN");
  }
  std::vector<int64_t> kept;
  if (group == nullptr) {
    kept = suppress(box_values, score_values, nullptr, count, iou_threshold);
  } else {
    STD_TORCH_CHECK(
        group->dim() == 1 && group->size(0) == count && group->scalar_type() == ScalarType::Long && group->is_cpu(),
        "batched_nms3d: group must be int64, on the same device, of the shape [N]");
    const Tensor group_values = torch::stable::contiguous(*group);
    kept = suppress(box_values, score_values, group_values.const_data_ptr<int64_t>(), count, iou_threshold);
  }
  Tensor result = torch::stable::new_empty(boxes, {static_cast<int64_t>(kept.size())}, ScalarType::Long);
  std::copy(kept.begin(), kept.end(), result.mutable_data_ptr<int64_t>());
  return result;
}

Tensor nms3d(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
  return run(boxes, scores, nullptr, iou_threshold);
}

Tensor batched_nms3d(const Tensor& boxes, const Tensor& scores, const Tensor& group, double iou_threshold) {
  return run(boxes, scores, &group, iou_threshold);
}

}  // namespace
}  // namespace seg3d

STABLE_TORCH_LIBRARY_IMPL(seg3d, CPU, m) {
  m.impl("nms3d", TORCH_BOX(&seg3d::nms3d));
  m.impl("batched_nms3d", TORCH_BOX(&seg3d::batched_nms3d));
}
