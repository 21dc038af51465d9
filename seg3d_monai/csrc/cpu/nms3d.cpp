// Greedy non-maximum suppression of 3D boxes on the CPU, alone and within groups.
//
// A box is dropped if a better one of its group that is kept has an IoU over the threshold with it. That says for every
// box what becomes of it, in whatever order they are decided, as long as the better ones in reach come first. So boxes
// are decided bucket by bucket of a grid (box_grid.h), which walks memory locally, and within a bucket from best to
// worst. A box compares itself with the kept boxes of the buckets in its reach; where such a bucket still has better
// undecided boxes that matter, that bucket is decided up to there first, on an explicit stack.
//
// Cost: linear in the number of boxes times the number of kept boxes in a box's reach, which the threshold bounds for
// boxes of similar size; the boxes of one bucket are sorted, as are groups of few boxes. The kept boxes are sorted by
// score with a radix sort. Every IoU is taken in float64, whatever the dtype of the boxes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>
#include <vector>

#include "box_grid.h"
#include "radix_sort.h"

namespace seg3d {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
bool iou_is_over(const Box<T>& a, const Box<T>& b, double threshold) {
  double extents[3];
  bool overlap = true;
  for (int axis = 0; axis < 3; ++axis) {
    const T low = std::max(a.low[axis], b.low[axis]), high = std::min(a.high[axis], b.high[axis]);
    overlap &= low < high;
    extents[axis] = static_cast<double>(high) - static_cast<double>(low);
  }
  if (!overlap) {
    return false;
  }
  const double common = extents[0] * extents[1] * extents[2];
  return common / (a.volume() + b.volume() - common) > threshold;
}

// Against each kept box, from best to worst: the cheapest way for a few boxes.
template <typename T>
void suppress_few(std::span<Box<T>> boxes, double iou_threshold, uint8_t* kept) {
  std::sort(boxes.begin(), boxes.end(), [](const Box<T>& a, const Box<T>& b) { return a.is_better_than(b); });
  size_t num_kept = 0;
  for (const Box<T> box : boxes) {
    const std::span<Box<T>> better = boxes.first(num_kept);
    if (std::none_of(better.begin(), better.end(),
                     [&](const Box<T>& other) { return iou_is_over(other, box, iou_threshold); })) {
      boxes[num_kept++] = box;
      kept[box.index] = 1;
    }
  }
}

template <typename T>
class GridSuppression {
 public:
  // Sets kept[index] for the boxes that are kept.
  GridSuppression(std::span<const Box<T>> boxes, double iou_threshold, uint8_t* kept)
      : grid_(boxes, iou_threshold), iou_threshold_(iou_threshold) {
    // Each thread decides in its own run of buckets what waits for no bucket; then one thread decides the rest.
    const int64_t num_buckets = static_cast<int64_t>(grid_.buckets.size());
    torch::stable::parallel_for(0, num_buckets, 4096, [&](int64_t begin, int64_t end) { sweep(begin, end); });
    const std::span<const Bucket> all = grid_.buckets;
    for (const SizeClass& size_class : grid_.classes) {
      for (uint32_t i = 0; i <= size_class.mask; ++i) {
        decide({&grid_.buckets[size_class.first_bucket + i], &size_class}, all);
      }
    }
    for (const Bucket& bucket : grid_.buckets) {
      for (uint32_t i = bucket.begin; i < bucket.kept_end; ++i) {
        kept[grid_.boxes[i].index] = 1;
      }
    }
  }

 private:
  struct Place {
    Bucket* bucket;
    const SizeClass* size_class;
  };
  enum class Verdict { kKept, kDropped, kMustWait };

  // Undecided boxes that a box looks at before it lets their bucket be decided.
  static constexpr uint32_t kLookAhead = 8;

  BoxGrid<T> grid_;
  double iou_threshold_;

  const Box<T>& next_box(const Bucket& bucket) const { return grid_.boxes[bucket.next]; }

  void sweep(int64_t begin, int64_t end) {
    const std::span<const Bucket> mine(&grid_.buckets[begin], end - begin);
    for (const SizeClass& size_class : grid_.classes) {
      const int64_t first = size_class.first_bucket, last = first + size_class.mask;
      for (int64_t i = std::max(begin, first); i <= std::min(end - 1, last); ++i) {
        Bucket& bucket = grid_.buckets[i];
        Place awaited;
        while (bucket.next < bucket.end && decide_next(bucket, size_class, mine, awaited)) {
        }
      }
    }
  }

  // Decides all boxes of a bucket. The next box of each place on the stack waits for better boxes of the place above.
  // Scores rise along the stack, so no bucket is on it twice.
  void decide(Place first, std::span<const Bucket> all) {
    std::vector<Place> stack{first};
    while (!stack.empty()) {
      Bucket& bucket = *stack.back().bucket;
      if (bucket.next == bucket.end ||
          (stack.size() > 1 && !next_box(bucket).is_better_than(next_box(*stack[stack.size() - 2].bucket)))) {
        stack.pop_back();
        continue;
      }
      Place awaited;
      if (!decide_next(bucket, *stack.back().size_class, all, awaited)) {
        stack.push_back(awaited);
      }
    }
  }

  // False if the bucket's next box has to wait for a place.
  bool decide_next(Bucket& bucket, const SizeClass& own, std::span<const Bucket> readable, Place& awaited) {
    const Box<T> box = next_box(bucket);
    const Verdict verdict = judge(box, own, readable, awaited);
    if (verdict == Verdict::kMustWait) {
      return false;
    }
    ++bucket.next;
    if (verdict == Verdict::kKept) {
      grid_.boxes[bucket.kept_end++] = box;
    }
    return true;
  }

  Verdict judge(const Box<T>& box, const SizeClass& own, std::span<const Bucket> readable, Place& awaited) {
    for (const uint32_t other : own.meets) {
      const SizeClass& size_class = grid_.classes[other];
      const CellRange cells = grid_.near(box, size_class);
      for (int64_t z = cells.first[0]; z <= cells.last[0]; ++z) {
        for (int64_t y = cells.first[1]; y <= cells.last[1]; ++y) {
          for (int64_t x = cells.first[2]; x <= cells.last[2]; ++x) {
            Bucket& bucket = grid_.buckets[size_class.bucket(z, y, x)];
            const bool is_readable = &bucket >= readable.data() && &bucket < readable.data() + readable.size();
            const Verdict verdict = is_readable ? compare(box, bucket) : Verdict::kMustWait;
            if (verdict != Verdict::kKept) {
              awaited = {&bucket, &size_class};
              return verdict;
            }
          }
        }
      }
    }
    return Verdict::kKept;
  }

  // What the better boxes of one bucket leave of a box.
  Verdict compare(const Box<T>& box, const Bucket& bucket) const {
    for (uint32_t i = bucket.begin; i < bucket.kept_end; ++i) {
      if (iou_is_over(grid_.boxes[i], box, iou_threshold_)) {
        return Verdict::kDropped;
      }
    }
    const uint32_t end = std::min(bucket.end, bucket.next + kLookAhead);
    for (uint32_t i = bucket.next; i < end; ++i) {
      if (!grid_.boxes[i].is_better_than(box)) {
        return Verdict::kKept;
      }
      if (iou_is_over(grid_.boxes[i], box, iou_threshold_)) {
        return Verdict::kMustWait;
      }
    }
    return end == bucket.end ? Verdict::kKept : Verdict::kMustWait;
  }
};

// The values of a tensor as T, which holds them exactly; a copy only where the dtype is another.
template <typename T>
class Values {
 public:
  Values(const Tensor& tensor, const char* name) : tensor_(torch::stable::contiguous(tensor)) {
    switch (tensor_.scalar_type()) {
      case ScalarType::Double:
        read<double>();
        break;
      case ScalarType::Float:
        read<float>();
        break;
      case ScalarType::BFloat16:
        read<c10::BFloat16>();
        break;
      case ScalarType::Half:
        read<c10::Half>();
        break;
      default:
        STD_TORCH_CHECK(false, "nms3d: ", name, " must be float64, float32, bfloat16 or float16");
    }
  }

  T operator[](int64_t i) const { return values_[i]; }

 private:
  Tensor tensor_;
  std::vector<T> converted_;
  const T* values_;

  template <typename scalar_t>
  void read() {
    const scalar_t* source = tensor_.const_data_ptr<scalar_t>();
    if constexpr (std::is_same_v<scalar_t, T>) {
      values_ = source;
    } else {
      converted_.resize(tensor_.numel());
      std::transform(source, source + tensor_.numel(), converted_.begin(),
                     [](scalar_t value) { return static_cast<T>(value); });
      values_ = converted_.data();
    }
  }
};

template <typename T>
Box<T> read_box(const Values<T>& corners, const Values<T>& scores, uint32_t index) {
  Box<T> box;
  bool is_finite = true;
  for (int axis = 0; axis < 3; ++axis) {
    box.low[axis] = corners[int64_t(index) * 6 + axis];
    box.high[axis] = corners[int64_t(index) * 6 + axis + 3];
    is_finite &= std::isfinite(box.low[axis]) && std::isfinite(box.high[axis]);
  }
  STD_TORCH_CHECK(is_finite, "nms3d: boxes must be finite; remove boxes with NaN or infinite corners");
  STD_TORCH_CHECK(!std::isnan(scores[index]), "nms3d: scores must not be NaN");
  box.key = descending_key(scores[index]);
  box.index = index;
  return box;
}

template <typename T>
Tensor run(const Tensor& box_tensor, const Tensor& score_tensor, const int64_t* group, double iou_threshold) {
  const uint32_t count = static_cast<uint32_t>(box_tensor.size(0));
  const Values<T> corners(box_tensor, "boxes"), scores(score_tensor, "scores");
  std::vector<Keyed<uint64_t>> by_group;
  if (group != nullptr) {
    by_group.reserve(count);
    for (uint32_t i = 0; i < count; ++i) {
      by_group.push_back({static_cast<uint64_t>(group[i]), i});
    }
    radix_sort(by_group);
  }
  std::vector<uint8_t> kept(count, 0);
  std::vector<Box<T>> solid;  // group by group
  solid.reserve(count);
  std::vector<size_t> group_ends;
  for (uint32_t i = 0; i < count; ++i) {
    const Box<T> box = read_box(corners, scores, group == nullptr ? i : by_group[i].index);
    // A volume that is zero or infinite makes every IoU zero or NaN, which is over no threshold.
    if (box.volume() > 0 && box.volume() <= std::numeric_limits<double>::max()) {
      solid.push_back(box);
    } else {
      kept[box.index] = 1;
    }
    if (i + 1 == count || (group != nullptr && by_group[i + 1].key != by_group[i].key)) {
      group_ends.push_back(solid.size());
    }
  }
  const auto suppress = [&](int64_t group_index) {
    const size_t begin = group_index == 0 ? 0 : group_ends[group_index - 1];
    const std::span<Box<T>> boxes(solid.data() + begin, group_ends[group_index] - begin);
    if (boxes.size() <= 32) {
      suppress_few<T>(boxes, iou_threshold, kept.data());
    } else {
      GridSuppression<T>(boxes, iou_threshold, kept.data());
    }
  };
  // Groups run side by side; one alone shares its own work out.
  const int64_t num_groups = static_cast<int64_t>(group_ends.size());
  if (num_groups == 1) {
    suppress(0);
  } else {
    torch::stable::parallel_for(0, num_groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        suppress(i);
      }
    });
  }
  std::vector<Keyed<sort_key_t<T>>> by_score;
  by_score.reserve(count);
  for (uint32_t i = 0; i < count; ++i) {
    if (kept[i]) {
      by_score.push_back({descending_key(scores[i]), i});
    }
  }
  radix_sort(by_score);
  Tensor result = torch::stable::new_empty(box_tensor, {static_cast<int64_t>(by_score.size())}, ScalarType::Long);
  std::transform(by_score.begin(), by_score.end(), result.mutable_data_ptr<int64_t>(),
                 [](const auto& item) { return static_cast<int64_t>(item.index); });
  return result;
}

Tensor checked_run(const Tensor& boxes, const Tensor& scores, const int64_t* group, double iou_threshold) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 6, "nms3d: boxes must have the shape [N, 6]");
  STD_TORCH_CHECK(boxes.size(0) < int64_t(1) << 31, "nms3d: there must be fewer than 2^31 boxes");
  STD_TORCH_CHECK(scores.dim() == 1 && scores.size(0) == boxes.size(0), "nms3d: scores must have the shape [N]");
  STD_TORCH_CHECK(boxes.is_cpu() && scores.is_cpu(), "nms3d: all tensors must be on the same device");
  const bool is_double = boxes.scalar_type() == ScalarType::Double || scores.scalar_type() == ScalarType::Double;
  return is_double ? run<double>(boxes, scores, group, iou_threshold) : run<float>(boxes, scores, group, iou_threshold);
}

Tensor nms3d(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
  return checked_run(boxes, scores, nullptr, iou_threshold);
}

Tensor batched_nms3d(const Tensor& boxes, const Tensor& scores, const Tensor& group, double iou_threshold) {
  STD_TORCH_CHECK(
      group.dim() == 1 && group.size(0) == boxes.size(0) && group.scalar_type() == ScalarType::Long && group.is_cpu(),
      "batched_nms3d: group must be int64, on the same device, of the shape [N]");
  const Tensor values = torch::stable::contiguous(group);
  return checked_run(boxes, scores, values.const_data_ptr<int64_t>(), iou_threshold);
}

}  // namespace
}  // namespace seg3d

STABLE_TORCH_LIBRARY_IMPL(seg3d, CPU, m) {
  m.impl("nms3d", TORCH_BOX(&seg3d::nms3d));
  m.impl("batched_nms3d", TORCH_BOX(&seg3d::batched_nms3d));
}
