// Voxels, sums of coordinates and extents of the labels of a volume, on the CPU, in one pass over its runs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>

namespace seg3d {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A row of the result.
struct Extent {
  int64_t voxels;
  int64_t sum[3];
  int64_t lower[3];
  int64_t upper[3];

  // Take in the voxels (z, y, first) to (z, y, stop - 1).
  void add(int64_t z, int64_t y, int64_t first, int64_t stop) {
    const int64_t count = stop - first;
    const int64_t start[3] = {z, y, first}, end[3] = {z + 1, y + 1, stop};
    sum[0] += z * count;
    sum[1] += y * count;
    sum[2] += (first + stop - 1) * count / 2;
    for (int axis = 0; axis < 3; ++axis) {
      lower[axis] = voxels == 0 ? start[axis] : std::min(lower[axis], start[axis]);
      upper[axis] = std::max(upper[axis], end[axis]);
    }
    voxels += count;
  }
};
static_assert(sizeof(Extent) == 10 * sizeof(int64_t));

Tensor label_extents(const Tensor& labels, int64_t num_labels) {
  STD_TORCH_CHECK(labels.dim() == 3 && labels.is_cpu() && labels.scalar_type() == ScalarType::Int,
                  "label_extents: labels must be int32 [D, H, W], on the CPU");
  STD_TORCH_CHECK(num_labels >= 0, "label_extents: num_labels is negative");
  Tensor result = torch::stable::new_zeros(labels, {num_labels, 10}, ScalarType::Long);
  Extent* extents = reinterpret_cast<Extent*>(result.mutable_data_ptr<int64_t>());
  const int32_t* begin = labels.const_data_ptr<int32_t>();
  const int64_t step = labels.stride(2), width = labels.size(2);
  for (int64_t z = 0; z < labels.size(0); ++z) {
    for (int64_t y = 0; y < labels.size(1); ++y) {
      const int32_t* row = begin + z * labels.stride(0) + y * labels.stride(1);
      for (int64_t x = 0; x < width;) {
        const int32_t label = row[x * step];
        const int64_t first = x;
        do {
          ++x;
        } while (x < width && row[x * step] == label);
        STD_TORCH_CHECK(0 <= label && label <= num_labels, "label_extents: a label is not in 0 to num_labels");
        if (label > 0) {
          extents[label - 1].add(z, y, first, x);
        }
      }
    }
  }
  return result;
}

}  // namespace
}  // namespace seg3d

STABLE_TORCH_LIBRARY_IMPL(seg3d, CPU, m) {
  m.impl("label_extents", TORCH_BOX(&seg3d::label_extents));
}
