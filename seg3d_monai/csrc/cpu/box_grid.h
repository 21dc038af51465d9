// A grid of box centres that finds, for any box, those that can have an IoU over a threshold t with it.
//
// The IoU of two boxes is at most the IoU of their intervals on any axis, since the other axes only lower it. So an IoU
// over t needs, for the extents a and b on each axis,
//     min(a, b) / max(a, b) > t    and    distance of the centres < (1 - t) / (1 + t) * (a + b) / 2.
// By the first, boxes are put into size classes, of which most cannot meet: one huge box does not coarsen the cells of
// the others. By the second, a box need look only at the cells near its centre in each class that its own one meets.
//
// A class has one cell size and endlessly many cells: cell (z, y, x) is bucket z * stride_z + y * stride_y + x, modulo
// a power of two near the number of boxes. Neighbours stay near each other in memory; far outliers, flat and slanted
// layouts cost no memory. Distant cells may share a bucket, which costs comparisons and changes no result.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <vector>

#include "radix_sort.h"

namespace seg3d {

template <typename T>
struct Box {
  T low[3], high[3];
  sort_key_t<T> key;  // of the score
  uint32_t index;

  bool is_better_than(const Box& other) const { return key != other.key ? key < other.key : index < other.index; }
  double extent(int axis) const { return static_cast<double>(high[axis]) - static_cast<double>(low[axis]); }
  double centre(int axis) const { return 0.5 * static_cast<double>(low[axis]) + 0.5 * static_cast<double>(high[axis]); }
  double volume() const { return std::max(extent(0), 0.0) * std::max(extent(1), 0.0) * std::max(extent(2), 0.0); }
};

// Boxes [begin, kept_end) are kept, [next, end) are undecided, each run from best to worst.
struct Bucket {
  uint32_t begin, kept_end, next, end;
};

// The cells first .. last, both included, on the axes z, y, x.
struct CellRange {
  std::array<int64_t, 3> first, last;
};

struct SizeClass {
  uint32_t num_boxes = 0;
  std::array<double, 3> smallest, largest, total{};  // extents
  std::array<double, 3> farthest{};                  // from the origin
  std::array<double, 3> cells_per_voxel;
  uint64_t stride_z, stride_y, mask;
  uint32_t first_bucket;
  std::vector<uint32_t> meets;  // the classes whose boxes can have an IoU over the threshold with boxes of this one

  uint32_t bucket(uint64_t z, uint64_t y, uint64_t x) const {
    return first_bucket + static_cast<uint32_t>((z * stride_z + y * stride_y + x) & mask);
  }

  // No box of the class is in a cell beyond 1e12; see BoxGrid::lay_out.
  int64_t cell(double position, int axis) const {
    const double cell = std::clamp(position * cells_per_voxel[axis], -1e13, 1e13);
    const int64_t towards_zero = static_cast<int64_t>(cell);
    return towards_zero - (static_cast<double>(towards_zero) > cell);
  }
};

template <typename T>
class BoxGrid {
 public:
  std::vector<SizeClass> classes;
  std::vector<Bucket> buckets;
  std::unique_ptr<Box<T>[]> boxes;  // by bucket, from best to worst

  // Every box has a positive, finite volume.
  BoxGrid(std::span<const Box<T>> unsorted, double iou_threshold) {
    const std::vector<uint16_t> class_of = classify(unsorted);
    lay_out(iou_threshold);
    fill(unsorted, class_of);
  }

  // Where the centres of the boxes of `other` lie that can have an IoU over the threshold with `box`: nowhere if even
  // the largest ones that fit into the box or around it do not.
  CellRange near(const Box<T>& box, const SizeClass& other) const {
    CellRange range;
    double num_cells = 1, most_common = 1, least_volume = 1;
    for (int axis = 0; axis < 3; ++axis) {
      const double centre = box.centre(axis), extent = box.extent(axis);
      most_common *= std::min(extent, other.largest[axis]);
      least_volume *= other.smallest[axis];
      // Rounding of centres and extents must not lose a box.
      const double distance = reach_ * (0.5 * extent + 0.5 * other.largest[axis]) + 1e-15 * std::abs(centre);
      range.first[axis] = other.cell(centre - distance, axis);
      range.last[axis] = other.cell(centre + distance, axis);
      num_cells *= static_cast<double>(range.last[axis] - range.first[axis] + 1);
    }
    if (most_common < threshold_ * std::max(box.volume(), least_volume)) {
      return {{0, 0, 0}, {-1, -1, -1}};
    }
    // More cells than buckets: each bucket once will do.
    return num_cells > static_cast<double>(other.mask) ? CellRange{{0, 0, 0}, {0, 0, static_cast<int64_t>(other.mask)}}
                                                       : range;
  }

 private:
  static constexpr int kClassesPerAxis = 8;
  double threshold_;  // t, rounded down
  double reach_;      // (1 - t) / (1 + t), rounded up

  static int exponent(double extent) { return static_cast<int>(std::bit_cast<uint64_t>(extent) >> 52); }

  // Replaces the marks of the exponents that occur by numbers of classes, from the largest extents down. A class spans
  // three powers of two, or more where that would make too many classes.
  static void number_exponents(std::span<uint8_t, 2048> marks) {
    const int most = static_cast<int>(std::find(marks.rbegin(), marks.rend(), 1).base() - marks.begin()) - 1;
    const int least = static_cast<int>(std::find(marks.begin(), marks.end(), 1) - marks.begin());
    for (int width = 3;; width *= 2) {
      std::array<uint8_t, 2048> numbers{};
      int num_classes = 0;
      for (int exponent = most, next_class = most; exponent >= least; --exponent) {
        if (marks[exponent] && exponent <= next_class) {
          ++num_classes;
          next_class = exponent - width;
        }
        numbers[exponent] = static_cast<uint8_t>(num_classes - 1);
      }
      if (num_classes <= kClassesPerAxis) {
        std::copy(numbers.begin(), numbers.end(), marks.begin());
        return;
      }
    }
  }

  // The class of each box, by the powers of two of its three extents.
  std::vector<uint16_t> classify(std::span<const Box<T>> unsorted) {
    // Relative to the largest extent, so that stretching an axis changes nothing.
    std::array<double, 3> scale{};
    for (const Box<T>& box : unsorted) {
      for (int axis = 0; axis < 3; ++axis) {
        scale[axis] = std::max(scale[axis], box.extent(axis));
      }
    }
    for (double& factor : scale) {
      factor = (1 - 1e-9) / std::max(factor, 1e-300);
    }
    std::array<std::array<uint8_t, 2048>, 3> number{};
    for (const Box<T>& box : unsorted) {
      for (int axis = 0; axis < 3; ++axis) {
        number[axis][exponent(box.extent(axis) * scale[axis])] = 1;
      }
    }
    for (int axis = 0; axis < 3; ++axis) {
      number_exponents(number[axis]);
    }
    std::array<int, kClassesPerAxis * kClassesPerAxis * kClassesPerAxis> class_of_numbers;
    class_of_numbers.fill(-1);
    std::vector<uint16_t> class_of(unsorted.size());
    for (size_t i = 0; i < unsorted.size(); ++i) {
      const Box<T>& box = unsorted[i];
      std::array<double, 3> extents;
      int numbers = 0;
      for (int axis = 0; axis < 3; ++axis) {
        extents[axis] = box.extent(axis);
        numbers = numbers * kClassesPerAxis + number[axis][exponent(extents[axis] * scale[axis])];
      }
      int& size_class = class_of_numbers[numbers];
      if (size_class < 0) {
        size_class = static_cast<int>(classes.size());
        classes.emplace_back().smallest = extents;
        classes.back().largest = extents;
      }
      class_of[i] = static_cast<uint16_t>(size_class);
      SizeClass& own = classes[size_class];
      ++own.num_boxes;
      for (int axis = 0; axis < 3; ++axis) {
        own.smallest[axis] = std::min(own.smallest[axis], extents[axis]);
        own.largest[axis] = std::max(own.largest[axis], extents[axis]);
        own.total[axis] += extents[axis];
        own.farthest[axis] = std::max(own.farthest[axis], std::abs(box.centre(axis)));
      }
    }
    return class_of;
  }

  void lay_out(double iou_threshold) {
    // The bounds on extents and distances hold but for rounding; where volumes could underflow, only for t = 0.
    threshold_ = iou_threshold * (1 - 1e-9);
    for (const SizeClass& own : classes) {
      threshold_ = *std::min_element(own.smallest.begin(), own.smallest.end()) < 1e-100 ? 0 : threshold_;
    }
    reach_ = (1 - threshold_) / (1 + threshold_) * (1 + 1e-9);
    uint32_t num_buckets = 0;
    for (SizeClass& own : classes) {
      for (int axis = 0; axis < 3; ++axis) {
        // One and a half times what a box of mean extent looks at, which measured best. Cells beyond 1e12 would be
        // below the precision of centres.
        const double width = 1.5 * reach_ * (own.largest[axis] + own.total[axis] / own.num_boxes);
        own.cells_per_voxel[axis] = 1 / std::clamp(width, std::max(own.farthest[axis] * 1e-12, 1e-290), 1e300);
      }
      const uint32_t size = std::bit_ceil(own.num_boxes);
      // Odd strides, so that cells along any axis or diagonal fill all buckets.
      own.stride_y = static_cast<uint64_t>(std::cbrt(size)) | 1;
      own.stride_z = own.stride_y * own.stride_y;
      own.mask = size - 1;
      own.first_bucket = num_buckets;
      num_buckets += size;
      for (uint32_t i = 0; i < classes.size(); ++i) {
        double best_iou = 1;
        for (int axis = 0; axis < 3; ++axis) {
          best_iou = std::min(
              {best_iou, classes[i].largest[axis] / own.smallest[axis], own.largest[axis] / classes[i].smallest[axis]});
        }
        if (best_iou >= threshold_) {
          own.meets.push_back(i);
        }
      }
    }
    buckets.assign(num_buckets, Bucket{});
  }

  void fill(std::span<const Box<T>> unsorted, const std::vector<uint16_t>& class_of) {
    const uint32_t count = static_cast<uint32_t>(unsorted.size());
    std::vector<Keyed<uint32_t>> by_bucket(count);
    for (uint32_t i = 0; i < count; ++i) {
      const Box<T>& box = unsorted[i];
      const SizeClass& own = classes[class_of[i]];
      by_bucket[i] = {own.bucket(own.cell(box.centre(0), 0), own.cell(box.centre(1), 1), own.cell(box.centre(2), 2)),
                      i};
    }
    radix_sort(by_bucket);
    boxes = std::make_unique_for_overwrite<Box<T>[]>(count);
    for (uint32_t i = 0; i < count; ++i) {
      boxes[i] = unsorted[by_bucket[i].index];
    }
    uint32_t end = 0;
    for (uint32_t i = 0; i < buckets.size(); ++i) {
      const uint32_t begin = end;
      while (end < count && by_bucket[end].key == i) {
        ++end;
      }
      buckets[i] = {begin, begin, begin, end};
      std::sort(&boxes[begin], &boxes[end], [](const Box<T>& a, const Box<T>& b) { return a.is_better_than(b); });
    }
  }
};

}  // namespace seg3d
