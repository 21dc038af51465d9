// Assignment of boxes to true boxes by IoU on the CPU.
//
// No matrix of all pairs is written. The boxes are laid out column by column, and a vector of them is held against one
// true box after the other; true boxes beyond the hull of a vector's boxes are passed over, which are most of them, as
// neighbouring anchors stand in neighbouring rows. The first pass finds the best true box of each box, and the best IoU
// of each true box; where the boxes that reach that IoU match too, a second pass finds them. Both passes take the same
// numbers in the same order, so that the IoU of a pair has the same bits in both.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <mutex>
#include <vector>

#include "cpu/lanes.h"

namespace seg3d {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Floats = Vec<float>;
using Ints = VecOf<float>::index;

constexpr int64_t kLanes = num_lanes<float>;
constexpr int64_t kVectorsPerTask = 64;
constexpr int64_t kBackground = -1, kIgnored = -2;

struct TrueBox {
  float low[3], high[3], volume;
};

// As many boxes as a vector has lanes, and their hull.
struct Boxes {
  Floats low[3], high[3], volume;
  float hull_low[3], hull_high[3];

  bool are_near(const TrueBox& truth) const {
    bool overlap = true;
    for (int axis = 0; axis < 3; ++axis) {
      overlap &= (truth.low[axis] < hull_high[axis]) & (truth.high[axis] > hull_low[axis]);
    }
    return overlap;
  }

  // NaN where both are empty, or a corner is NaN.
  Floats iou(const TrueBox& truth) const {
    Floats common = Floats{} + 1;
    for (int axis = 0; axis < 3; ++axis) {
      const Floats from = low[axis] > truth.low[axis] ? low[axis] : Floats{} + truth.low[axis];
      const Floats to = high[axis] < truth.high[axis] ? high[axis] : Floats{} + truth.high[axis];
      common *= to > from ? to - from : Floats{};
    }
    return common / (volume + truth.volume - common);
  }
};

TrueBox read_box(const float* corners) {
  TrueBox box;
  box.volume = 1;
  for (int axis = 0; axis < 3; ++axis) {
    box.low[axis] = corners[axis];
    box.high[axis] = corners[axis + 3];
    // A NaN stays one: a box that has it overlaps nothing.
    const float extent = box.high[axis] - box.low[axis];
    box.volume *= extent < 0 ? 0 : extent;
  }
  return box;
}

// The boxes first .. first + count - 1 of [M, 6]; empty ones fill the vector.
Boxes read_boxes(const float* corners, int64_t first, int64_t count) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  Boxes boxes = {};
  std::fill_n(boxes.hull_low, 3, infinity);
  std::fill_n(boxes.hull_high, 3, -infinity);
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const TrueBox box = read_box(corners + 6 * (first + std::min(lane, count - 1)));
    for (int axis = 0; axis < 3; ++axis) {
      boxes.low[axis][lane] = box.low[axis];
      boxes.high[axis][lane] = lane < count ? box.high[axis] : box.low[axis];
      boxes.hull_low[axis] = std::min(boxes.hull_low[axis], box.low[axis]);
      boxes.hull_high[axis] = std::max(boxes.hull_high[axis], box.high[axis]);
    }
    boxes.volume[lane] = lane < count ? box.volume : 0;
  }
  return boxes;
}

class Matching {
 public:
  Matching(const float* boxes, int64_t num_boxes, const float* truth, int64_t num_truth, int64_t* matched)
      : num_boxes_(num_boxes), boxes_((num_boxes + kLanes - 1) / kLanes), matched_(matched), reached_(num_truth, 0) {
    for (int64_t g = 0; g < num_truth; ++g) {
      truth_.push_back(read_box(truth + 6 * g));
    }
    for_each_vector(
        [&](int64_t i) { boxes_[i] = read_boxes(boxes, i * kLanes, std::min(kLanes, num_boxes_ - i * kLanes)); });
  }

  void match_by_thresholds(float foreground_iou, float background_iou) {
    std::mutex mutex;
    torch::stable::parallel_for(0, boxes_.size(), kVectorsPerTask, [&](int64_t begin, int64_t end) {
      std::vector<Floats> reached(truth_.size());
      for (int64_t i = begin; i < end; ++i) {
        const Boxes& boxes = boxes_[i];
        Floats best = {};
        Ints index = {};
        for (size_t g = 0; g < truth_.size(); ++g) {
          if (boxes.are_near(truth_[g])) {
            const Floats iou = boxes.iou(truth_[g]);
            index = iou > best ? Ints{} + static_cast<int32_t>(g) : index;
            best = iou > best ? iou : best;
            reached[g] = iou > reached[g] ? iou : reached[g];
          }
        }
        for (int64_t row = i * kLanes, lane = 0; lane < kLanes && row < num_boxes_; ++lane, ++row) {
          matched_[row] = best[lane] >= foreground_iou  ? index[lane]
                          : best[lane] < background_iou ? kBackground
                                                        : kIgnored;
        }
      }
      const std::lock_guard lock(mutex);
      for (size_t g = 0; g < truth_.size(); ++g) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          reached_[g] = std::max(reached_[g], reached[g][lane]);
        }
      }
    });
  }

  // Match the boxes that reach the best IoU of a true box; among several true boxes the first one counts.
  void match_best() {
    for_each_vector([&](int64_t i) {
      const Boxes& boxes = boxes_[i];
      Ints index = Ints{} - 1;
      for (size_t g = truth_.size(); g-- > 0;) {
        if (reached_[g] > 0 && boxes.are_near(truth_[g])) {
          index = boxes.iou(truth_[g]) == reached_[g] ? Ints{} + static_cast<int32_t>(g) : index;
        }
      }
      for (int64_t row = i * kLanes, lane = 0; lane < kLanes && row < num_boxes_; ++lane, ++row) {
        if (index[lane] >= 0) {
          matched_[row] = index[lane];
        }
      }
    });
  }

 private:
  int64_t num_boxes_;
  std::vector<Boxes> boxes_;
  std::vector<TrueBox> truth_;
  int64_t* matched_;
  std::vector<float> reached_;  // the best IoU of each true box

  template <typename Function>
  void for_each_vector(Function function) {
    torch::stable::parallel_for(0, boxes_.size(), kVectorsPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        function(i);
      }
    });
  }
};

Tensor match_boxes3d(const Tensor& boxes, const Tensor& truth, double foreground_iou, double background_iou,
                     bool match_best) {
  for (const Tensor* tensor : {&boxes, &truth}) {
    STD_TORCH_CHECK(
        tensor->dim() == 2 && tensor->size(1) == 6 && tensor->is_cpu() && tensor->scalar_type() == ScalarType::Float,
        "match_boxes3d: boxes and truth must be float32, on the same device, of the shapes [M, 6], [G, 6]");
    STD_TORCH_CHECK(tensor->size(0) < int64_t(1) << 31, "match_boxes3d: there must be fewer than 2^31 boxes");
  }
  const Tensor rows = torch::stable::contiguous(boxes), true_rows = torch::stable::contiguous(truth);
  const int64_t num_boxes = rows.size(0), num_truth = true_rows.size(0);
  Tensor result = torch::stable::new_empty(rows, {num_boxes}, ScalarType::Long);
  int64_t* matched = result.mutable_data_ptr<int64_t>();
  if (num_truth == 0) {
    std::fill(matched, matched + num_boxes, kBackground);
    return result;
  }
  Matching matching(rows.const_data_ptr<float>(), num_boxes, true_rows.const_data_ptr<float>(), num_truth, matched);
  matching.match_by_thresholds(static_cast<float>(foreground_iou), static_cast<float>(background_iou));
  if (match_best) {
    matching.match_best();
  }
  return result;
}

}  // namespace
}  // namespace seg3d

STABLE_TORCH_LIBRARY_IMPL(seg3d, CPU, m) {
  m.impl("match_boxes3d", TORCH_BOX(&seg3d::match_boxes3d));
}
