// Runs the kernels of non-maximum suppression once, in the order of nms3d.cu: run_nms3d FOLDER.
#include <numeric>

#include "call.h"
#include "cuda/nms3d.cuh"

using seg3d::kNmsThreads;

// What torch's stable sort gives the operator.
template <typename T, typename Less>
Array<int64_t> stable_order(const T* keys, size_t count, Less less) {
  Array<int64_t> order(count);
  std::iota(order.data(), order.data() + count, int64_t(0));
  std::stable_sort(order.data(), order.data() + count, [&](int64_t a, int64_t b) { return less(keys[a], keys[b]); });
  return order;
}

template <typename box_t>
void run(const Call& call) {
  const auto boxes = call.array<box_t>("boxes");
  const auto scores = call.array<float>("scores");
  const auto group = call.array<int64_t>("group");
  const size_t n = scores.size();
  const int count = static_cast<int>(n);
  const bool has_group = group.size() > 0;
  const auto blocks = static_cast<unsigned>(call.integer("blocks"));
  const auto launch = [&](auto body) { cuda_shim::launch(blocks, kNmsThreads, body); };

  const Array<seg3d::BoxStatistics> shares(blocks);
  const Array<seg3d::SweepPlan> plan(1);
  launch([&] { seg3d::collect_statistics(boxes.data(), scores.data(), count, shares.data()); });
  cuda_shim::launch(1, seg3d::kStatisticsBlocks,
                    [&] { seg3d::plan_sweep(shares.data(), static_cast<int>(blocks), plan.data()); });
  const Array<box_t> keys(n);
  const Array<int> slabs(n);
  launch([&] { seg3d::sweep_keys(boxes.data(), count, plan.data(), keys.data(), slabs.data()); });
  Array<int64_t> order = stable_order(keys.data(), n, std::less<>());
  std::stable_sort(order.data(), order.data() + n,
                   [&](int64_t a, int64_t b) { return slabs.data()[a] < slabs.data()[b]; });
  if (has_group) {
    std::stable_sort(order.data(), order.data() + n,
                     [&](int64_t a, int64_t b) { return group.data()[a] < group.data()[b]; });
  }
  const Array<int64_t> by_rank = stable_order(scores.data(), n, std::greater<>());
  const Array<int> rank(n);
  launch([&] { seg3d::invert(by_rank.data(), count, rank.data()); });

  const Array<box_t> low0(n), low1(n), low2(n), high0(n), high1(n), high2(n);
  const Array<int> sorted_rank(n), sorted_slab(n), place_of_rank(n), first(n * seg3d::kRuns), last(n * seg3d::kRuns);
  const Array<int64_t> sorted_group(has_group ? n : 0);
  const Array<seg3d::BoxState> state(n);
  const seg3d::Sweep<box_t> sweep{count,
                                  call.number("threshold"),
                                  low0.data(),
                                  low1.data(),
                                  low2.data(),
                                  high0.data(),
                                  high1.data(),
                                  high2.data(),
                                  sorted_rank.data(),
                                  sorted_slab.data(),
                                  place_of_rank.data(),
                                  first.data(),
                                  last.data(),
                                  has_group ? sorted_group.data() : nullptr,
                                  state.data()};
  launch(
      [&] { seg3d::arrange(boxes.data(), group.data(), slabs.data(), order.data(), rank.data(), plan.data(), sweep); });
  launch([&] { seg3d::find_runs(plan.data(), sweep); });
  const auto rounds = static_cast<int>(call.integer("rounds"));
  const Array<int> undecided(static_cast<size_t>(rounds) + 1);
  for (int round = 0; round < rounds; ++round) {
    launch([&] { seg3d::decide_round(sweep, round, undecided.data()); });
  }
  const int all_are = 1;
  const int* rest = rounds > 0 ? undecided.data() + rounds - 1 : &all_are;
  cuda_shim::launch(1, kNmsThreads, [&] { seg3d::decide_rest(sweep, rest); });

  const Array<bool> is_kept(n);
  launch([&] { seg3d::mark_kept(sweep, is_kept.data()); });
  const Array<int64_t> number(n), outcome(2);
  for (size_t i = 0; i < n; ++i) {
    number.data()[i] = (i > 0 ? number.data()[i - 1] : 0) + (is_kept.data()[i] ? 1 : 0);
  }
  cuda_shim::launch(1, 1, [&] { seg3d::take_outcome(number.data(), count, plan.data(), outcome.data()); });
  const Array<int64_t> result(static_cast<size_t>(outcome.data()[0]));
  launch([&] { seg3d::list_kept(is_kept.data(), number.data(), by_rank.data(), count, result.data()); });
  call.write("result", result);
  call.write("outcome", outcome);
}

int main(int, char** arguments) {
  const Call call(arguments[1]);
  call.word("dtype") == "float64" ? run<double>(call) : run<float>(call);
  return 0;
}
