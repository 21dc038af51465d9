// Greedy non-maximum suppression of 3D boxes on CUDA, alone and within groups.
//
// Cost: three or four sorts of n keys, and for each box one scan, by a warp, of the boxes that may overlap it on the
// two axes that are best for it: O(n log n + n * r), r the length of such a scan; in a cube at constant density r grows
// as n^(1/3). Boxes are decided in rounds over the whole grid, which return at once when nothing is left. A chain of
// boxes, each overlapping the next, may take more rounds than there are; one block decides the rest by rank, O(u * r)
// for u boxes left. The extra memory is O(n); no pairs are kept. The host waits once, for the number of boxes kept.
// Every IoU is taken in float64, whatever the dtype of the boxes.
#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

#include "launch.h"
#include "nms3d.cuh"

namespace seg3d {
namespace {

constexpr int kRounds = 12;
// Enough to fill any device; a round that has nothing to do ends the sooner.
constexpr unsigned kRoundBlocks = 4096;

Tensor as_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, std::optional<ScalarType>(dtype));
}

// Float32 holds every value of the half types.
Tensor as_float_or_double(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  "nms3d: ", name, " must be float64, float32, bfloat16 or float16");
  return torch::stable::contiguous(
      as_dtype(tensor, dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float));
}

// The stable order of one axis of keys, int64.
Tensor stable_order(const Tensor& keys, bool descending) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(keys),
                                    torch::stable::detail::from(std::optional<bool>(true)),
                                    torch::stable::detail::from(int64_t(0)), torch::stable::detail::from(descending)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  const Tensor values = torch::stable::detail::to<Tensor>(stack[0]);
  return torch::stable::detail::to<Tensor>(stack[1]);
}

Tensor index_select(const Tensor& tensor, const Tensor& index) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(tensor), torch::stable::detail::from(int64_t(0)),
                                    torch::stable::detail::from(index)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor cumulative_sum(const Tensor& tensor) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(tensor), torch::stable::detail::from(int64_t(0)),
                                    torch::stable::detail::from(std::optional<ScalarType>(ScalarType::Long))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cumsum", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <typename box_t>
Tensor suppress(const Tensor& boxes, const Tensor& scores, const Tensor* group, double iou_threshold) {
  const int64_t n = boxes.size(0);
  const int count = static_cast<int>(n);
  const cudaStream_t stream = current_stream(boxes);
  const unsigned blocks = num_blocks(n, kNmsThreads);
  const auto make = [&](int64_t size, ScalarType dtype) { return torch::stable::new_empty(boxes, {size}, dtype); };

  const Tensor shares = make(kStatisticsBlocks * sizeof(BoxStatistics) / 8, ScalarType::Long);
  const Tensor plan_values = make(sizeof(SweepPlan) / 8, ScalarType::Long);
  auto* plan = reinterpret_cast<SweepPlan*>(mutable_data<int64_t>(plan_values));
  auto* share = reinterpret_cast<BoxStatistics*>(mutable_data<int64_t>(shares));
  const int num_shares = static_cast<int>(std::min<unsigned>(blocks, kStatisticsBlocks));
  if (scores.scalar_type() == ScalarType::Double) {
    collect_statistics<<<num_shares, kNmsThreads, 0, stream>>>(data<box_t>(boxes), data<double>(scores), count, share);
  } else {
    collect_statistics<<<num_shares, kNmsThreads, 0, stream>>>(data<box_t>(boxes), data<float>(scores), count, share);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  plan_sweep<<<1, kStatisticsBlocks, 0, stream>>>(share, num_shares, plan);
  STD_CUDA_KERNEL_LAUNCH_CHECK();

  const Tensor keys = make(n, boxes.scalar_type());
  const Tensor slabs = make(n, ScalarType::Int);
  sweep_keys<<<blocks, kNmsThreads, 0, stream>>>(data<box_t>(boxes), count, plan, mutable_data<box_t>(keys),
                                                 mutable_data<int>(slabs));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  Tensor order = stable_order(keys, false);
  order = index_select(order, stable_order(index_select(slabs, order), false));
  if (group != nullptr) {
    order = index_select(order, stable_order(index_select(*group, order), false));
  }
  const Tensor by_rank = stable_order(scores, true);
  const Tensor rank = make(n, ScalarType::Int);
  invert<<<blocks, kNmsThreads, 0, stream>>>(data<int64_t>(by_rank), count, mutable_data<int>(rank));
  STD_CUDA_KERNEL_LAUNCH_CHECK();

  const Tensor corners = make(6 * n, boxes.scalar_type());
  const Tensor places = make((3 + 2 * kRuns) * n, ScalarType::Int);
  const Tensor groups = make(group == nullptr ? 0 : n, ScalarType::Long);
  const Tensor states = make(n, ScalarType::Byte);
  auto* corner = mutable_data<box_t>(corners);
  auto* place = mutable_data<int>(places);
  const Sweep<box_t> sweep{count,
                           iou_threshold,
                           corner,
                           corner + n,
                           corner + 2 * n,
                           corner + 3 * n,
                           corner + 4 * n,
                           corner + 5 * n,
                           place,
                           place + n,
                           place + 2 * n,
                           place + 3 * n,
                           place + (3 + kRuns) * n,
                           group == nullptr ? nullptr : mutable_data<int64_t>(groups),
                           reinterpret_cast<BoxState*>(mutable_data<uint8_t>(states))};
  arrange<<<blocks, kNmsThreads, 0, stream>>>(data<box_t>(boxes), group == nullptr ? nullptr : data<int64_t>(*group),
                                              data<int>(slabs), data<int64_t>(order), data<int>(rank), plan, sweep);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  find_runs<<<blocks, kNmsThreads, 0, stream>>>(plan, sweep);
  STD_CUDA_KERNEL_LAUNCH_CHECK();

  const Tensor undecided = torch::stable::new_zeros(boxes, {kRounds}, ScalarType::Int);
  auto* flags = mutable_data<int>(undecided);
  for (int round = 0; round < kRounds; ++round) {
    decide_round<<<std::min(num_blocks(n, kNmsWarps), kRoundBlocks), kNmsThreads, 0, stream>>>(sweep, round, flags);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  decide_rest<<<1, kNmsThreads, 0, stream>>>(sweep, flags + kRounds - 1);
  STD_CUDA_KERNEL_LAUNCH_CHECK();

  const Tensor is_kept = make(n, ScalarType::Bool);
  mark_kept<<<blocks, kNmsThreads, 0, stream>>>(sweep, mutable_data<bool>(is_kept));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  // One copy to the host: how many are kept, and how many cannot be compared at all.
  const Tensor number = cumulative_sum(is_kept);
  const Tensor outcome = make(2, ScalarType::Long);
  take_outcome<<<1, 1, 0, stream>>>(data<int64_t>(number), count, plan, mutable_data<int64_t>(outcome));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const Tensor on_host = torch::stable::to(outcome, torch::stable::Device(torch::headeronly::DeviceType::CPU));
  const int64_t kept = data<int64_t>(on_host)[0], invalid = data<int64_t>(on_host)[1];
  STD_TORCH_CHECK(invalid == 0, "nms3d: boxes must be finite and scores not NaN; ", invalid, " of ", n,
                  " boxes are not: remove them");
  const Tensor result = make(kept, ScalarType::Long);
  list_kept<<<blocks, kNmsThreads, 0, stream>>>(data<bool>(is_kept), data<int64_t>(number), data<int64_t>(by_rank),
                                                count, mutable_data<int64_t>(result));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

Tensor run(const Tensor& boxes, const Tensor& scores, const Tensor* group, double iou_threshold) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 6, "nms3d: boxes must have the shape [N, 6]");
  const int64_t count = boxes.size(0);
  STD_TORCH_CHECK(count < 2147480000, "nms3d: fewer than 2147480000 boxes on CUDA, got ", count);
  STD_TORCH_CHECK(scores.dim() == 1 && scores.size(0) == count, "nms3d: scores must have the shape [N]");
  STD_TORCH_CHECK(is_same_device(boxes, scores), "nms3d: all tensors must be on the same device");
  STD_TORCH_CHECK(group == nullptr || (group->dim() == 1 && group->size(0) == count &&
                                       group->scalar_type() == ScalarType::Long && is_same_device(boxes, *group)),
                  "batched_nms3d: group must be int64, on the same device, of the shape [N]");
  const torch::stable::accelerator::DeviceGuard guard(boxes.get_device_index());
  const Tensor box_rows = as_float_or_double(boxes, "boxes"), score_values = as_float_or_double(scores, "scores");
  if (count == 0) {
    return torch::stable::new_empty(boxes, {0}, ScalarType::Long);
  }
  const bool is_double = box_rows.scalar_type() == ScalarType::Double;
  return is_double ? suppress<double>(box_rows, score_values, group, iou_threshold)
                   : suppress<float>(box_rows, score_values, group, iou_threshold);
}

Tensor nms3d(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
  return run(boxes, scores, nullptr, iou_threshold);
}

Tensor batched_nms3d(const Tensor& boxes, const Tensor& scores, const Tensor& group, double iou_threshold) {
  const Tensor groups = torch::stable::contiguous(group);
  return run(boxes, scores, &groups, iou_threshold);
}

}  // namespace
}  // namespace seg3d

STABLE_TORCH_LIBRARY_IMPL(seg3d, CUDA, m) {
  m.impl("nms3d", TORCH_BOX(&seg3d::nms3d));
  m.impl("batched_nms3d", TORCH_BOX(&seg3d::batched_nms3d));
}
