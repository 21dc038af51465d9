// Which labels of two volumes share voxels, and how many, on the CPU.
//
// Labels change seldom along a row, so voxels are taken in runs of one pair, and a run costs one look into a hash table
// with linear probing. The pairs that occur are sorted at the end. Cost: one comparison a voxel, one look-up a run.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <tuple>
#include <utility>
#include <vector>

namespace seg3d {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Counts by key; a slot without a count is free.
class Counter {
 public:
  Counter() : slots_(size_t(1) << bits_) {}

  void add(uint64_t key, int64_t count) {
    Slot& slot = find(key);
    if (slot.second == 0) {
      slot.first = key;
      if (2 * ++used_ > slots_.size()) {
        grow();
        find(key) = {key, count};
        return;
      }
    }
    slot.second += count;
  }

  std::vector<std::pair<uint64_t, int64_t>> sorted() const {
    std::vector<Slot> found;
    std::copy_if(slots_.begin(), slots_.end(), std::back_inserter(found), [](const Slot& s) { return s.second > 0; });
    std::sort(found.begin(), found.end());
    return found;
  }

 private:
  using Slot = std::pair<uint64_t, int64_t>;

  Slot& find(uint64_t key) {
    size_t place = (key * 0x9E3779B97F4A7C15u) >> (64 - bits_);
    while (slots_[place].second > 0 && slots_[place].first != key) {
      place = (place + 1) & (slots_.size() - 1);
    }
    return slots_[place];
  }

  void grow() {
    std::vector<Slot> old(slots_.size() * 2);
    old.swap(slots_);
    ++bits_;
    for (const Slot& slot : old) {
      if (slot.second > 0) {
        find(slot.first) = slot;
      }
    }
  }

  int bits_ = 10;
  size_t used_ = 0;
  std::vector<Slot> slots_;
};

std::tuple<Tensor, Tensor> label_pairs(const Tensor& a, const Tensor& b) {
  for (const Tensor& labels : {a, b}) {
    STD_TORCH_CHECK(labels.dim() == 3 && labels.is_cpu() && labels.scalar_type() == ScalarType::Int,
                    "label_pairs: labels must be int32 [D, H, W], on the CPU");
  }
  for (int axis = 0; axis < 3; ++axis) {
    STD_TORCH_CHECK(a.size(axis) == b.size(axis), "label_pairs: both volumes must have one shape");
  }
  const int32_t *begin_a = a.const_data_ptr<int32_t>(), *begin_b = b.const_data_ptr<int32_t>();
  const int64_t step_a = a.stride(2), step_b = b.stride(2), width = a.size(2);
  Counter counter;
  for (int64_t z = 0; z < a.size(0); ++z) {
    for (int64_t y = 0; y < a.size(1); ++y) {
      const int32_t* row_a = begin_a + z * a.stride(0) + y * a.stride(1);
      const int32_t* row_b = begin_b + z * b.stride(0) + y * b.stride(1);
      for (int64_t x = 0; x < width;) {
        const int32_t label_a = row_a[x * step_a], label_b = row_b[x * step_b];
        STD_TORCH_CHECK(label_a >= 0 && label_b >= 0, "label_pairs: a label is negative");
        const int64_t first = x;
        do {
          ++x;
        } while (x < width && row_a[x * step_a] == label_a && row_b[x * step_b] == label_b);
        counter.add(static_cast<uint64_t>(label_a) << 32 | static_cast<uint32_t>(label_b), x - first);
      }
    }
  }
  const auto found = counter.sorted();
  const int64_t count = static_cast<int64_t>(found.size());
  Tensor pairs = torch::stable::new_empty(a, {count, 2}, ScalarType::Long);
  Tensor counts = torch::stable::new_empty(a, {count}, ScalarType::Long);
  int64_t *pair = pairs.mutable_data_ptr<int64_t>(), *number = counts.mutable_data_ptr<int64_t>();
  for (const auto& [key, voxels] : found) {
    *pair++ = static_cast<int64_t>(key >> 32);
    *pair++ = static_cast<int64_t>(key & 0xFFFFFFFFu);
    *number++ = voxels;
  }
  return {pairs, counts};
}

}  // namespace
}  // namespace seg3d

STABLE_TORCH_LIBRARY_IMPL(seg3d, CPU, m) {
  m.impl("label_pairs", TORCH_BOX(&seg3d::label_pairs));
}
