// The kernels of greedy non-maximum suppression of 3D boxes.
//
// Boxes lie by (group, slab, lower corner on the sweep axis). A slab is as thick as the longest box, so all boxes that
// may overlap a box are three runs of places, one in each of three neighbouring slabs. A box is dropped as soon as a
// kept box of better rank overlaps it too much, and kept as soon as all such boxes are dropped; this gives the same
// boxes as visiting them one after the other, in whatever order the decisions fall.
#pragma once

#include <cmath>
#include <cstdint>

#include "trilinear.h"

namespace seg3d {

constexpr int kNmsThreads = 256;
constexpr int kNmsWarps = kNmsThreads / 32;
constexpr int kStatisticsBlocks = 128;

enum BoxState : unsigned char { kUndecided, kKept, kDropped };

// What the boxes have in common; a block's share of it, and at last all of it.
struct BoxStatistics {
  double low[3], high[3], extents[3], longest[3];
  int64_t invalid;  // boxes that are not finite, or whose score is NaN
};

__device__ inline BoxStatistics no_boxes() {
  BoxStatistics none;
  for (int axis = 0; axis < 3; ++axis) {
    none.low[axis] = INFINITY;
    none.high[axis] = -INFINITY;
    none.extents[axis] = none.longest[axis] = 0;
  }
  none.invalid = 0;
  return none;
}

__device__ inline void join(BoxStatistics& all, const BoxStatistics& other) {
  for (int axis = 0; axis < 3; ++axis) {
    all.low[axis] = fmin(all.low[axis], other.low[axis]);
    all.high[axis] = fmax(all.high[axis], other.high[axis]);
    all.extents[axis] += other.extents[axis];
    all.longest[axis] = fmax(all.longest[axis], other.longest[axis]);
  }
  all.invalid += other.invalid;
}

// Join what the threads of a block have put into `shared`; the first of them gets all of it.
template <int threads>
__device__ inline void join_block(BoxStatistics (&shared)[threads]) {
  for (int half = threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      join(shared[threadIdx.x], shared[threadIdx.x + half]);
    }
  }
}

// One block's share of the statistics, to shares[block].
template <typename box_t, typename score_t>
__global__ void __launch_bounds__(kNmsThreads, 1)
    collect_statistics(const box_t* __restrict__ boxes, const score_t* __restrict__ scores, int count,
                       BoxStatistics* shares) {
  __shared__ BoxStatistics shared[kNmsThreads];
  BoxStatistics mine = no_boxes();
  for (int64_t i = int64_t(blockIdx.x) * kNmsThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kNmsThreads) {
    bool is_valid = !std::isnan(__ldg(scores + i));
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      const double low = __ldg(boxes + i * 6 + axis), high = __ldg(boxes + i * 6 + axis + 3);
      const double extent = fmax(0.0, high - low);
      is_valid = is_valid && std::isfinite(low) && std::isfinite(high);
      mine.low[axis] = fmin(mine.low[axis], low);
      mine.high[axis] = fmax(mine.high[axis], high);
      mine.extents[axis] += extent;
      mine.longest[axis] = fmax(mine.longest[axis], extent);
    }
    mine.invalid += !is_valid;
  }
  shared[threadIdx.x] = mine;
  join_block(shared);
  if (threadIdx.x == 0) {
    shares[blockIdx.x] = shared[0];
  }
}

constexpr int kMostSlabs = 1 << 20;

// How to sweep: along the axis on which boxes are shortest against their spread, in slabs along the next best axis.
struct SweepPlan {
  double reach;  // of the longest box on the sweep axis
  double slab_low, slab_extent;
  int64_t axis, slab_axis;
  int64_t invalid;
};

// By one block of kStatisticsBlocks threads.
static __global__ void __launch_bounds__(kStatisticsBlocks, 1)
    plan_sweep(const BoxStatistics* shares, int num_shares, SweepPlan* plan) {
  __shared__ BoxStatistics shared[kStatisticsBlocks];
  shared[threadIdx.x] = threadIdx.x < num_shares ? shares[threadIdx.x] : no_boxes();
  join_block(shared);
  if (threadIdx.x != 0) {
    return;
  }
  const BoxStatistics& all = shared[0];
  const auto spread = [&](int axis) { return all.high[axis] - all.low[axis]; };
  const auto fitness = [&](int axis) { return spread(axis) / fmax(all.extents[axis], 1e-300); };
  const int axis = fitness(0) >= fitness(1) && fitness(0) >= fitness(2) ? 0 : fitness(1) >= fitness(2) ? 1 : 2;
  const int next = (axis + 1) % 3, after = (axis + 2) % 3;
  const int slab_axis = fitness(next) >= fitness(after) ? next : after;
  plan->axis = axis;
  plan->slab_axis = slab_axis;
  plan->reach = all.longest[axis];
  plan->slab_low = all.low[slab_axis];
  // A little thicker than the longest box, so that rounding cannot put boxes that overlap two slabs apart.
  plan->slab_extent = fmax(fmax(1.000001 * all.longest[slab_axis], spread(slab_axis) / kMostSlabs), 1e-300);
  plan->invalid = all.invalid;
}

// By what boxes are sorted: their lower corner on the sweep axis, and their slab.
template <typename box_t>
__global__ void sweep_keys(const box_t* boxes, int count, const SweepPlan* plan, box_t* keys, int* slabs) {
  for (int64_t i = int64_t(blockIdx.x) * kNmsThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kNmsThreads) {
    const double place = (boxes[i * 6 + plan->slab_axis] - plan->slab_low) / plan->slab_extent;
    keys[i] = boxes[i * 6 + plan->axis];
    slabs[i] = place > 0 && place <= kMostSlabs ? static_cast<int>(place) : 0;  // 0 also for NaN
  }
}

// The rank of every box from the boxes by rank.
static __global__ void invert(const int64_t* by_rank, int count, int* rank) {
  for (int64_t i = int64_t(blockIdx.x) * kNmsThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kNmsThreads) {
    rank[by_rank[i]] = static_cast<int>(i);
  }
}

constexpr int kRuns = 3;

// Boxes by place, an array a coordinate; axis 0 is the sweep axis. A place's runs, first .. last, hold all others that
// may overlap its box, less those at the front that are settled, as far as this box is concerned.
template <typename box_t>
struct Sweep {
  int count;
  double iou_threshold;
  box_t *low0, *low1, *low2, *high0, *high1, *high2;
  int *rank, *slab, *place_of_rank;
  int *first, *last;  // kRuns each
  int64_t* group;     // null where all boxes are in one
  BoxState* state;
};

template <typename box_t>
__global__ void arrange(const box_t* boxes, const int64_t* group, const int* slabs, const int64_t* order,
                        const int* rank, const SweepPlan* plan, Sweep<box_t> sweep) {
  const int axis = static_cast<int>(plan->axis);
  for (int64_t place = int64_t(blockIdx.x) * kNmsThreads + threadIdx.x; place < sweep.count;
       place += int64_t(gridDim.x) * kNmsThreads) {
    const int64_t index = order[place];
    const box_t* box = boxes + index * 6;
    sweep.low0[place] = box[axis];
    sweep.low1[place] = box[(axis + 1) % 3];
    sweep.low2[place] = box[(axis + 2) % 3];
    sweep.high0[place] = box[axis + 3];
    sweep.high1[place] = box[(axis + 1) % 3 + 3];
    sweep.high2[place] = box[(axis + 2) % 3 + 3];
    sweep.rank[place] = rank[index];
    sweep.slab[place] = slabs[index];
    sweep.place_of_rank[rank[index]] = static_cast<int>(place);
    if (sweep.group != nullptr) {
      sweep.group[place] = group[index];
    }
  }
}

// The first place in a slab of the group of `place` whose box begins at `limit` or behind it.
template <typename box_t>
__device__ inline int first_from(const Sweep<box_t>& sweep, int64_t place, int slab, double limit) {
  const int64_t wanted = sweep.group == nullptr ? 0 : sweep.group[place];
  int begin = 0, end = sweep.count;
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    const int64_t group = sweep.group == nullptr ? 0 : sweep.group[middle];
    const bool is_before = group != wanted
                               ? group < wanted
                               : (sweep.slab[middle] != slab ? sweep.slab[middle] < slab
                                                             : static_cast<double>(sweep.low0[middle]) < limit);
    begin = is_before ? middle + 1 : begin;
    end = is_before ? end : middle;
  }
  return begin;
}

// The runs of every place. An empty box overlaps nothing, so it is kept at once.
template <typename box_t>
__global__ void find_runs(const SweepPlan* plan, Sweep<box_t> sweep) {
  for (int64_t place = int64_t(blockIdx.x) * kNmsThreads + threadIdx.x; place < sweep.count;
       place += int64_t(gridDim.x) * kNmsThreads) {
    const double low = sweep.low0[place], high = sweep.high0[place];
    const bool is_empty =
        !(low < high) || !(sweep.low1[place] < sweep.high1[place]) || !(sweep.low2[place] < sweep.high2[place]);
    // A little further than the reach, for the rounding of the difference.
    const double limit = low - plan->reach - 1e-15 * (fabs(low) + plan->reach);
    sweep.state[place] = is_empty ? kKept : kUndecided;
    for (int run = 0; run < kRuns; ++run) {
      const int slab = sweep.slab[place] + run - 1;
      sweep.first[place * kRuns + run] = is_empty ? 0 : first_from(sweep, place, slab, limit);
      sweep.last[place * kRuns + run] = is_empty ? 0 : first_from(sweep, place, slab, high);
    }
  }
}

template <typename box_t>
__device__ inline bool overlaps(const Sweep<box_t>& sweep, int a, int b) {
  const box_t low0 = sweep.low0[a] > sweep.low0[b] ? sweep.low0[a] : sweep.low0[b],
              low1 = sweep.low1[a] > sweep.low1[b] ? sweep.low1[a] : sweep.low1[b],
              low2 = sweep.low2[a] > sweep.low2[b] ? sweep.low2[a] : sweep.low2[b],
              high0 = sweep.high0[a] < sweep.high0[b] ? sweep.high0[a] : sweep.high0[b],
              high1 = sweep.high1[a] < sweep.high1[b] ? sweep.high1[a] : sweep.high1[b],
              high2 = sweep.high2[a] < sweep.high2[b] ? sweep.high2[a] : sweep.high2[b];
  if (!(low0 < high0 && low1 < high1 && low2 < high2)) {
    return false;
  }
  const auto extent = [](box_t low, box_t high) { return static_cast<double>(high) - static_cast<double>(low); };
  const auto volume = [](double z, double y, double x) { return product(product(z, y), x); };
  const double common = volume(extent(low0, high0), extent(low1, high1), extent(low2, high2));
  const double volume_a = volume(extent(sweep.low0[a], sweep.high0[a]), extent(sweep.low1[a], sweep.high1[a]),
                                 extent(sweep.low2[a], sweep.high2[a]));
  const double volume_b = volume(extent(sweep.low0[b], sweep.high0[b]), extent(sweep.low1[b], sweep.high1[b]),
                                 extent(sweep.low2[b], sweep.high2[b]));
  return common / (volume_a + volume_b - common) > sweep.iou_threshold;
}

// Other warps decide at the same time; a decision that is not seen yet is only a later one.
__device__ inline BoxState state_of(const volatile BoxState* state) {
  return static_cast<BoxState>(*state);
}

// Try to decide one box, by a whole warp. True if it stays undecided.
template <typename box_t>
__device__ inline bool decide(const Sweep<box_t>& sweep, int place) {
  const int lane = threadIdx.x % 32;
  const int rank = sweep.rank[place];
  bool waits = false;
  for (int run = 0; run < kRuns; ++run) {
    int* first = sweep.first + int64_t(place) * kRuns + run;
    const int last = sweep.last[int64_t(place) * kRuns + run];
    int settled = last;
    for (int start = *first; start < last; start += 32) {
      const int other = start + lane;
      BoxState state = kDropped;
      if (other < last && sweep.rank[other] < rank) {
        state = state_of(sweep.state + other);
        if (state != kDropped && !overlaps(sweep, place, other)) {
          state = kDropped;
        }
      }
      if (__any_sync(0xffffffffu, state == kKept)) {
        if (lane == 0) {
          *const_cast<volatile BoxState*>(sweep.state + place) = kDropped;
        }
        return false;
      }
      if (__any_sync(0xffffffffu, state == kUndecided)) {
        settled = settled < start ? settled : start;
      }
    }
    waits = waits || settled < last;
    __syncwarp();
    if (lane == 0) {
      *first = settled;
    }
  }
  if (lane == 0 && !waits) {
    *const_cast<volatile BoxState*>(sweep.state + place) = kKept;
  }
  return waits;
}

// One round over all boxes, a warp a box. `undecided[round]` becomes 1 if the next round has something to do.
template <typename box_t>
__global__ void __launch_bounds__(kNmsThreads, 1) decide_round(Sweep<box_t> sweep, int round, int* undecided) {
  if (round > 0 && undecided[round - 1] == 0) {
    return;
  }
  for (int64_t place = int64_t(blockIdx.x) * kNmsWarps + threadIdx.x / 32; place < sweep.count;
       place += int64_t(gridDim.x) * kNmsWarps) {
    if (state_of(sweep.state + place) != kUndecided) {
      continue;
    }
    if (decide(sweep, static_cast<int>(place)) && threadIdx.x % 32 == 0) {
      undecided[round] = 1;
    }
  }
}

// What the rounds left, by one block: boxes in the order of their ranks, as many at a time as there are warps. All of
// better rank are decided then, so each turn decides at least the best of them.
template <typename box_t>
__global__ void __launch_bounds__(kNmsThreads, 1) decide_rest(Sweep<box_t> sweep, const int* undecided) {
  if (*undecided == 0) {
    return;
  }
  __shared__ int places[kNmsThreads];
  __shared__ int found_before[kNmsWarps + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t start = 0; start < sweep.count; start += kNmsThreads) {
    const int64_t rank = start + threadIdx.x;
    const int place = rank < sweep.count ? sweep.place_of_rank[rank] : -1;
    const bool is_left = place >= 0 && state_of(sweep.state + place) == kUndecided;
    const unsigned left = __ballot_sync(0xffffffffu, is_left);
    __syncthreads();
    if (lane == 0) {
      found_before[warp + 1] = __popc(left);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      found_before[0] = 0;
      for (int i = 0; i < kNmsWarps; ++i) {
        found_before[i + 1] += found_before[i];
      }
    }
    __syncthreads();
    if (is_left) {
      places[found_before[warp] + __popc(left & ((1u << lane) - 1))] = place;
    }
    __syncthreads();
    for (int number = 0; number < found_before[kNmsWarps]; number += kNmsWarps) {
      bool waits = number + warp < found_before[kNmsWarps];
      do {
        waits = waits && decide(sweep, places[number + warp]);
      } while (__syncthreads_or(waits));
    }
  }
}

// Whether the box of each rank is kept.
template <typename box_t>
__global__ void mark_kept(Sweep<box_t> sweep, bool* is_kept) {
  for (int64_t rank = int64_t(blockIdx.x) * kNmsThreads + threadIdx.x; rank < sweep.count;
       rank += int64_t(gridDim.x) * kNmsThreads) {
    is_kept[rank] = sweep.state[sweep.place_of_rank[rank]] == kKept;
  }
}

// How many boxes are kept and how many are invalid, by one thread, so that the host copies both at once.
static __global__ void take_outcome(const int64_t* number, int count, const SweepPlan* plan, int64_t* outcome) {
  outcome[0] = number[count - 1];
  outcome[1] = plan->invalid;
}

// The indices of the kept boxes by rank; `number` counts the kept ones up to and with each rank.
static __global__ void list_kept(const bool* is_kept, const int64_t* number, const int64_t* by_rank, int count,
                                 int64_t* result) {
  for (int64_t rank = int64_t(blockIdx.x) * kNmsThreads + threadIdx.x; rank < count;
       rank += int64_t(gridDim.x) * kNmsThreads) {
    if (is_kept[rank]) {
      result[number[rank] - 1] = by_rank[rank];
    }
  }
}

}  // namespace seg3d
