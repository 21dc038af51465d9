// The order in which deformable attention goes through its samples, and where each of them lies.
//
// All samples of one head are visited level by level. A level whose rows do not fit into the second-level cache is cut
// into slabs along z or y, and its samples are sorted by slab, in their order otherwise. So the rows that are in use
// fit into the cache, at the price of one more pass over the queries a slab. Whether a level is cut depends on the
// sizes of the call alone: results do not depend on how queries are shared among threads.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/lanes.h"

namespace seg3d {

constexpr int64_t kCorners = 8;

struct Level {
  int64_t start;  // its first row in the value
  std::array<int64_t, 3> size;

  int64_t slice() const { return size[1] * size[2]; }
  int64_t num_rows() const { return size[0] * slice(); }
};

struct AttendSizes {
  int64_t batch, rows, heads, channels, queries, points;
  std::vector<Level> levels;

  int64_t num_heads() const { return batch * heads; }
  int64_t num_samples() const { return static_cast<int64_t>(levels.size()) * points; }  // of one (query, head)
  int64_t row_stride() const { return heads * channels; }
};

struct HeadPlace {
  int64_t image, head;

  int64_t first_row_channel(const AttendSizes& sizes) const {
    return image * sizes.rows * sizes.row_stride() + head * sizes.channels;
  }
  int64_t item(int64_t query, const AttendSizes& sizes) const {
    return (image * sizes.queries + query) * sizes.heads + head;
  }
  int64_t first_output(int64_t query, const AttendSizes& sizes) const { return item(query, sizes) * sizes.channels; }
};

template <typename acc_t>
struct DeformInputs {
  const acc_t* locations;  // [N, Lq, M, L, P, 3]
  const acc_t* shares;     // [N, Lq, M, L, P]

  // A row [M, Dh] for each query of each image: what the samples are added to, or their gradients.
  const void* query_rows;
  int64_t head_bytes;

  // The samples of a level, and the rows of a head, lie too far apart for the processor to foresee.
  void prefetch(int64_t sample, int64_t item) const {
    __builtin_prefetch(locations + sample * 3);
    __builtin_prefetch(shares + sample);
    for (int64_t byte = 0; byte < head_bytes; byte += 64) {
      __builtin_prefetch(static_cast<const char*>(query_rows) + item * head_bytes + byte);
    }
  }
};

// The slices first .. last (exclusive) of one level along z (axis 0) or y (axis 1).
struct Slab {
  const Level* level;
  int axis;
  int64_t first, last;
  bool is_dense;           // its samples read it often enough to copy it side by side first
  bool is_first, is_last;  // of its level

  int64_t low(int a) const { return a == axis ? first : 0; }
  int64_t extent(int a) const { return a == axis ? last - first : level->size[a]; }
  int64_t num_rows() const { return extent(0) * extent(1) * extent(2); }

  // Call visit(row of the value, row of the slab, number of rows) for all runs of rows that follow each other in both.
  template <typename Visit>
  void for_each_run(Visit visit) const {
    const int64_t run = extent(1) * extent(2);
    for (int64_t z = 0; z < extent(0); ++z) {
      visit(level->start + (low(0) + z) * level->slice() + low(1) * level->size[2], z * run, run);
    }
  }
};

// Where rows lie, in bytes: those of the slab alone, or those of its whole level.
struct SlabRows {
  int64_t address, stride;
  bool is_slab;
};

// As many samples of one slab as a vector has lanes. Corner c has the bits (z, y, x), 1 for the high side.
template <typename acc_t>
class SampleBlock {
 public:
  using Index = typename VecOf<acc_t>::index;
  static constexpr int64_t lanes = num_lanes<acc_t>;

  int64_t count() const { return count_; }
  int64_t query(int64_t i) const { return query_[i]; }
  int64_t sample(int64_t i) const { return sample_[i]; }
  Vec<acc_t> shares() const { return load_lanes<acc_t>(shares_); }
  Vec<acc_t> size(int axis) const { return Vec<acc_t>{} + size_[axis]; }
  Vec<acc_t> weight(int axis, int64_t side) const { return weight_[axis][side]; }
  Index is_inside(int64_t corner) const { return (inside_ & (1 << corner)) != 0; }
  // Of a corner's row; of the slab's first row if the corner is outside.
  int64_t address(int64_t corner, int64_t i) const { return address_[corner][i]; }

  void clear() { count_ = 0; }
  bool is_full() const { return count_ == lanes; }
  void add(const DeformInputs<acc_t>& inputs, int64_t query, int64_t sample) {
    query_[count_] = query;
    sample_[count_] = sample;
    shares_[count_] = inputs.shares[sample];
    for (int axis = 0; axis < 3; ++axis) {
      location_[axis][count_] = inputs.locations[sample * 3 + axis];
    }
    ++count_;
  }

  // Find the rows: zero_padded_sample of trilinear.h for all lanes at once.
  void place(const Slab& slab, const SlabRows& rows) {
    for (int64_t i = count_; i < lanes; ++i) {
      // Lanes without a sample lie outside.
      query_[i] = query_[0];
      shares_[i] = acc_t(0);
      location_[0][i] = location_[1][i] = location_[2][i] = acc_t(-9);
    }
    const Level& level = *slab.level;
    const int64_t steps[3] = {rows.is_slab ? slab.extent(1) * slab.extent(2) : level.slice(), level.size[2], 1};
    Index row = {}, side_inside[3][2];
    for (int axis = 0; axis < 3; ++axis) {
      size_[axis] = static_cast<acc_t>(level.size[axis]);
      Vec<acc_t> position = load_lanes<acc_t>(location_[axis]) * size_[axis] - acc_t(0.5);
      const Index is_near = (position >= acc_t(-1)) & (position < size_[axis]);
      position = is_near ? position : Vec<acc_t>{};
      Index low = __builtin_convertvector(position, Index);
      low += __builtin_convertvector(low, Vec<acc_t>) > position;  // a comparison that holds is -1
      weight_[axis][1] = position - __builtin_convertvector(low, Vec<acc_t>);
      weight_[axis][0] = acc_t(1) - weight_[axis][1];
      side_inside[axis][0] = is_near & (low >= 0);
      side_inside[axis][1] = is_near & (low < static_cast<decltype(low[0] + 0)>(level.size[axis] - 1));
      row += (low - static_cast<decltype(low[0] + 0)>(rows.is_slab ? slab.low(axis) : 0)) *
             static_cast<decltype(low[0] + 0)>(steps[axis]);
    }
    alignas(64) int64_t first_corner[lanes];
    for (int64_t i = 0; i < lanes; ++i) {
      first_corner[i] = rows.address + static_cast<int64_t>(row[i]) * rows.stride;
    }
    inside_ = Index{};
#pragma GCC unroll 8
    for (int64_t c = 0; c < kCorners; ++c) {
      const Index is_inside = side_inside[0][c >> 2] & side_inside[1][c >> 1 & 1] & side_inside[2][c & 1];
      inside_ |= is_inside & (1 << c);
      const int64_t step = ((c >> 2) * steps[0] + (c >> 1 & 1) * steps[1] + (c & 1)) * rows.stride;
      for (int64_t i = 0; i < lanes; ++i) {
        address_[c][i] = is_inside[i] ? first_corner[i] + step : rows.address;
      }
    }
  }

  // Call visit(query, for_each_corner) for each sample; for_each_corner(visit) calls visit(address of the row, product
  // of trilinear and attention weight) for the corners that are inside.
  template <typename Visit>
  void for_each_sample(Visit visit) const {
    alignas(64) acc_t products[kCorners][lanes];
    for (int64_t c = 0; c < kCorners; ++c) {
      const Vec<acc_t> trilinear = weight_[0][c >> 2] * weight_[1][c >> 1 & 1] * weight_[2][c & 1];
      store_lanes<acc_t>(products[c], trilinear * shares());
    }
    alignas(64) std::conditional_t<sizeof(acc_t) == 4, int32_t, int64_t> inside[lanes];
    std::memcpy(inside, &inside_, sizeof(inside));
    for (int64_t i = 0; i < count_; ++i) {
      visit(query_[i], [&](auto visit_corner) {
        if (inside[i] == (1 << kCorners) - 1) {
#pragma GCC unroll 8
          for (int64_t c = 0; c < kCorners; ++c) {
            visit_corner(address_[c][i], products[c][i]);
          }
        } else {
          for (uint32_t left = static_cast<uint32_t>(inside[i]); left != 0; left &= left - 1) {
            const int c = std::countr_zero(left);
            visit_corner(address_[c][i], products[c][i]);
          }
        }
      });
    }
  }

 private:
  int64_t count_ = 0;
  int64_t query_[lanes], sample_[lanes];
  acc_t size_[3];
  alignas(64) acc_t shares_[lanes], location_[3][lanes];
  Vec<acc_t> weight_[3][2];
  Index inside_;  // bit c: corner c is inside
  alignas(64) int64_t address_[kCorners][lanes];
};

template <typename acc_t>
class DeformWalk {
 public:
  // `row_bytes` is what one row of a head takes. It must not depend on how work is shared, since slabs decide the order
  // of sums.
  DeformWalk(const AttendSizes& sizes, int64_t row_bytes) : sizes_(sizes) {
    for (const Level& level : sizes.levels) {
      // A copy pays where the samples read more rows than the level has.
      const bool is_dense = sizes.heads > 1 && level.num_rows() < sizes.queries * sizes.points;
      const int axis = level.size[0] >= level.size[1] ? 0 : 1;
      const int64_t slice = level.size[1 - axis] * level.size[2];
      const int64_t most_slices = kSlabBytes / std::max<int64_t>(slice * row_bytes, 1);
      // Neighbouring slabs share a slice.
      const bool is_whole = !is_dense || most_slices >= level.size[axis];
      cuts_.push_back({is_dense, axis, is_whole ? level.size[axis] : std::max<int64_t>(most_slices - 1, 1)});
    }
  }

  // Visit the samples of the queries first .. last of one head: begin_slab(slab) says where its rows lie,
  // visit(block) is called for its samples, end_slab(slab) follows. A slab comes again for other queries where there
  // are too many to sort at once.
  template <typename BeginSlab, typename Visit, typename EndSlab>
  void run(const DeformInputs<acc_t>& inputs, const HeadPlace& place, int64_t first_query, int64_t last_query,
           BeginSlab begin_slab, Visit visit, EndSlab end_slab) {
    for (size_t l = 0; l < sizes_.levels.size(); ++l) {
      const Level& level = sizes_.levels[l];
      const auto [is_dense, axis, slices] = cuts_[l];
      const int64_t num_slabs = (level.size[axis] + slices - 1) / slices;
      const int64_t count = last_query - first_query;
      const int64_t num_turns = num_slabs == 1 ? 1 : (count * sizes_.points + kMostSorted - 1) / kMostSorted;
      for (int64_t turn = 0; turn < num_turns; ++turn) {
        const Part part{&level, static_cast<int64_t>(l), place, first_query + count * turn / num_turns,
                        first_query + count * (turn + 1) / num_turns};
        if (num_slabs > 1) {
          sort_by_slab(inputs, part, axis, slices, num_slabs);
        }
        for (int64_t s = 0; s < num_slabs; ++s) {
          const Slab slab{&level,
                          axis,
                          s * slices,
                          std::min((s + 1) * slices + 1, level.size[axis]),
                          is_dense,
                          turn == 0 && s == 0,
                          turn == num_turns - 1 && s == num_slabs - 1};
          const SlabRows rows = begin_slab(slab);
          for_each_sample(inputs, part, num_slabs > 1 ? s : -1, [&](int64_t query, int64_t sample) {
            block_.add(inputs, query, sample);
            if (block_.is_full()) {
              flush(slab, rows, visit);
            }
          });
          flush(slab, rows, visit);
          end_slab(slab);
        }
      }
    }
  }

 private:
  // Half of a usual second-level cache: the other half is for what streams through it.
  static constexpr int64_t kSlabBytes = 1 << 19;

  // Samples that are sorted at once.
  static constexpr int64_t kMostSorted = 1 << 17;

  struct Cut {
    bool is_dense;
    int axis;
    int64_t slices;  // of a slab, besides the one that it shares with the next
  };

  // The samples of some queries of one head on one level.
  struct Part {
    const Level* level;
    int64_t number;  // of the level
    HeadPlace place;
    int64_t first_query, last_query;

    int64_t first_sample(int64_t query, const AttendSizes& sizes) const {
      return place.item(query, sizes) * sizes.num_samples() + number * sizes.points;
    }
  };

  const AttendSizes& sizes_;
  std::vector<Cut> cuts_;
  std::vector<uint32_t> sorted_;  // query * points + point, counted from the first query of the part
  std::vector<int64_t> slab_begin_;
  SampleBlock<acc_t> block_;

  template <typename Visit>
  void flush(const Slab& slab, const SlabRows& rows, Visit visit) {
    if (block_.count() > 0) {
      block_.place(slab, rows);
      visit(static_cast<const SampleBlock<acc_t>&>(block_));
      block_.clear();
    }
  }

  // Call visit(query, sample) for the samples of a slab, or, where the part has one slab only (-1), for all.
  template <typename Visit>
  void for_each_sample(const DeformInputs<acc_t>& inputs, const Part& part, int64_t slab, Visit visit) const {
    if (slab < 0) {
      for (int64_t query = part.first_query; query < part.last_query; ++query) {
        const int64_t ahead = std::min(query + 16, part.last_query - 1);
        inputs.prefetch(part.first_sample(ahead, sizes_), part.place.item(ahead, sizes_));
        for (int64_t point = 0; point < sizes_.points; ++point) {
          visit(query, part.first_sample(query, sizes_) + point);
        }
      }
      return;
    }
    const int64_t end = slab_begin_[slab + 1];
    for (int64_t i = slab_begin_[slab]; i < end; ++i) {
      const uint32_t ahead = sorted_[std::min(i + 64, end - 1)], points = static_cast<uint32_t>(sizes_.points);
      const int64_t query_ahead = part.first_query + ahead / points, query = part.first_query + sorted_[i] / points;
      inputs.prefetch(part.first_sample(query_ahead, sizes_) + ahead % points, part.place.item(query_ahead, sizes_));
      visit(query, part.first_sample(query, sizes_) + sorted_[i] % points);
    }
  }

  void sort_by_slab(const DeformInputs<acc_t>& inputs, const Part& part, int axis, int64_t slices, int64_t num_slabs) {
    const acc_t extent = static_cast<acc_t>(part.level->size[axis]);
    const auto for_each_slab = [&](auto visit) {
      uint32_t number = 0;
      for (int64_t query = part.first_query; query < part.last_query; ++query) {
        const acc_t* locations = inputs.locations + part.first_sample(query, sizes_) * 3 + axis;
        for (int64_t point = 0; point < sizes_.points; ++point, ++number) {
          const acc_t position = locations[point * 3] * extent - acc_t(0.5);
          // What is outside, and NaN, may be anywhere.
          const int64_t slice = position > acc_t(0) && position < extent ? static_cast<int64_t>(position) : 0;
          visit(slice / slices, number);
        }
      }
    };
    slab_begin_.assign(num_slabs + 1, 0);
    for_each_slab([&](int64_t slab, uint32_t) { ++slab_begin_[slab + 1]; });
    for (int64_t s = 0; s < num_slabs; ++s) {
      slab_begin_[s + 1] += slab_begin_[s];
    }
    sorted_.resize((part.last_query - part.first_query) * sizes_.points);
    std::vector<int64_t> next(slab_begin_.begin(), slab_begin_.end() - 1);
    for_each_slab([&](int64_t slab, uint32_t number) { sorted_[next[slab]++] = number; });
  }
};

}  // namespace seg3d
