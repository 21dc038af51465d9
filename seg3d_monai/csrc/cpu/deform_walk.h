// The order in which deformable attention goes through its samples, and where each of them lies.
//
// The levels whose rows fit into the second-level cache together are visited at once, query by query. A larger level is
// cut into slabs along z or y, and its samples, some thousand queries a turn, are sorted by slab and visited slab by
// slab. So the rows in use are always in the cache. Whether a level is cut depends on the sizes of the call alone, and
// the samples of a query and those of a row come in the same order however queries are shared among threads.
#pragma once

#include <algorithm>
#include <array>
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

  // What belongs to a head lies too far apart for the processor to foresee.
  void prefetch_samples(int64_t first, int64_t count) const {
    prefetch_bytes(locations + first * 3, count * 3 * sizeof(acc_t));
    prefetch_bytes(shares + first, count * sizeof(acc_t));
  }
  void prefetch_row(int64_t item) const {
    prefetch_bytes(static_cast<const char*>(query_rows) + item * head_bytes, head_bytes);
  }

 private:
  static void prefetch_bytes(const void* begin, int64_t bytes) {
    for (int64_t byte = 0; byte < bytes; byte += 64) {
      __builtin_prefetch(static_cast<const char*>(begin) + byte);
    }
  }
};

// The slices first .. last (exclusive) of one level along z (axis 0) or y (axis 1).
struct Slab {
  const Level* level;
  int axis;
  int64_t first, last;
  bool is_dense;      // its samples read it often enough to copy it side by side first
  int64_t first_row;  // of the copy, among those that exist at a time

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

// Where rows lie, in bytes: those of the slab alone, or those of its whole level. A corner that is outside the level
// gets the row `outside`, which holds zeros, so that no sample needs a branch.
struct SlabRows {
  int64_t address, stride, outside;
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
  // Of a corner's row.
  int64_t address(int64_t corner, int64_t i) const { return reinterpret_cast<const int64_t*>(address_[corner])[i]; }
  // The product of a corner's trilinear and attention weight.
  acc_t product(int64_t corner, int64_t i) const { return product_[corner][i]; }

  void clear() { count_ = 0; }
  bool is_full() const { return count_ == lanes; }
  void add(int64_t query, int64_t sample, const acc_t* location, acc_t share) {
    query_[count_] = query;
    sample_[count_] = sample;
    shares_[count_] = share;
    for (int axis = 0; axis < 3; ++axis) {
      location_[axis][count_] = location[axis];
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
    Offsets first_corner[kParts];
    for (int64_t part = 0; part < kParts; ++part) {
      first_corner[part] = widen(row, part) * rows.stride + rows.address;
    }
#pragma GCC unroll 8
    for (int64_t c = 0; c < kCorners; ++c) {
      const Index is_inside = side_inside[0][c >> 2] & side_inside[1][c >> 1 & 1] & side_inside[2][c & 1];
      const Vec<acc_t> trilinear = weight_[0][c >> 2] * weight_[1][c >> 1 & 1] * weight_[2][c & 1];
      store_lanes<acc_t>(product_[c], trilinear * shares());
      const int64_t step = ((c >> 2) * steps[0] + (c >> 1 & 1) * steps[1] + (c & 1)) * rows.stride;
      for (int64_t part = 0; part < kParts; ++part) {
        address_[c][part] = widen(is_inside, part) ? first_corner[part] + step : Offsets{} + rows.outside;
      }
    }
  }

 private:
  static constexpr int64_t kParts = lanes / 8;  // that hold offsets of 64 bits

  int64_t count_ = 0;
  int64_t query_[lanes], sample_[lanes];
  acc_t size_[3];
  alignas(64) acc_t shares_[lanes], location_[3][lanes];
  Vec<acc_t> weight_[3][2];
  alignas(64) acc_t product_[kCorners][lanes];
  Offsets address_[kCorners][kParts];
};

template <typename acc_t>
class DeformWalk {
 public:
  // `row_bytes` is what one row of a head takes. It must not depend on how work is shared, since slabs decide the order
  // of sums.
  DeformWalk(const AttendSizes& sizes, int64_t row_bytes) : sizes_(sizes), blocks_(sizes.levels.size()) {
    const int64_t bytes = std::max<int64_t>(row_bytes, 1);
    int64_t num_cut = 0, rows_together = 0;
    for (size_t l = sizes.levels.size(); l-- > 0;) {  // the coarse levels first
      const Level& level = sizes.levels[l];
      const int axis = level.size[0] >= level.size[1] ? 0 : 1;
      // A copy pays where the samples read more rows than the level has.
      const bool is_dense = sizes.heads > 1 && level.num_rows() < sizes.queries * sizes.points;
      const bool is_cut = is_dense && (rows_together + level.num_rows()) * bytes > kTogetherBytes &&
                          static_cast<int64_t>(sizes.levels.size()) * sizes.points <= kMostSorted;
      const int64_t most_slices = kSlabBytes / (level.size[1 - axis] * level.size[2] * bytes);
      // Neighbouring slabs share a slice. Their numbers, too, have 16 bits.
      const int64_t slices = !is_cut || most_slices >= level.size[axis]
                                 ? level.size[axis]
                                 : std::max({most_slices - 1, level.size[axis] / (kMostSorted - 1) + 1, int64_t(1)});
      cuts_.push_back({&level, static_cast<int64_t>(l), is_dense, is_cut, axis, slices, is_cut ? 0 : rows_together});
      num_cut += is_cut;
      rows_together += is_dense && !is_cut ? level.num_rows() : 0;
      const int64_t rows_of_slab =
          is_cut ? std::min(slices + 1, level.size[axis]) * level.num_rows() / level.size[axis] : 0;
      num_dense_rows_ = std::max({num_dense_rows_, rows_together, rows_of_slab});
    }
    queries_a_turn_ = num_cut == 0 ? std::max<int64_t>(sizes.queries, 1)
                                   : std::max<int64_t>(kMostSorted / (num_cut * sizes.points), 1);
  }

  // How many copied rows exist at a time at most.
  int64_t num_dense_rows() const { return num_dense_rows_; }

  // Visit the samples of the queries first .. last of one head: begin_slab(slab) says where its rows lie,
  // visit(block) is called for its samples, end_slab(slab) follows. A slab comes again at each turn.
  template <typename BeginSlab, typename Visit, typename EndSlab>
  void run(const DeformInputs<acc_t>& inputs, const HeadPlace& place, int64_t first_query, int64_t last_query,
           BeginSlab begin_slab, Visit visit, EndSlab end_slab) {
    for (int64_t first = first_query; first < last_query; first += queries_a_turn_) {
      const Turn turn{place, first, std::min(first + queries_a_turn_, last_query)};
      visit_together(inputs, turn, begin_slab, visit, end_slab);
      const uint16_t* slabs = slabs_.data();
      for (const Cut& cut : cuts_) {
        if (cut.is_cut) {
          visit_slabs(inputs, turn, cut, slabs, begin_slab, visit, end_slab);
          slabs += turn.count() * sizes_.points;
        }
      }
    }
  }

 private:
  // Less than a second-level cache: the rest is for what streams through it.
  static constexpr int64_t kTogetherBytes = 900 << 10, kSlabBytes = 600 << 10;

  // Samples that are sorted in a turn. Their numbers have 16 bits.
  static constexpr int64_t kMostSorted = 1 << 16;

  struct Cut {
    const Level* level;
    int64_t number;  // of the level
    bool is_dense, is_cut;
    int axis;
    int64_t slices;     // of a slab, besides the one that it shares with the next
    int64_t first_row;  // of the copy, where levels are visited together

    int64_t num_slabs() const { return (level->size[axis] + slices - 1) / slices; }
    Slab slab(int64_t number) const {
      const int64_t last = std::min((number + 1) * slices + 1, level->size[axis]);
      return {level, axis, number * slices, last, is_dense, first_row};
    }
    int64_t slab_of(const acc_t* location) const {
      const acc_t extent = static_cast<acc_t>(level->size[axis]);
      const acc_t position = location[axis] * extent - acc_t(0.5);
      // What is outside, and NaN, may be anywhere.
      return position > acc_t(0) && position < extent ? static_cast<int64_t>(position) / slices : 0;
    }
  };

  // Some queries of one head.
  struct Turn {
    HeadPlace place;
    int64_t first_query, last_query;

    int64_t count() const { return last_query - first_query; }
    int64_t first_sample(int64_t query, const AttendSizes& sizes) const {
      return place.item(query, sizes) * sizes.num_samples();
    }
  };

  const AttendSizes& sizes_;
  std::vector<Cut> cuts_;
  int64_t num_dense_rows_ = 0, queries_a_turn_;
  std::vector<SampleBlock<acc_t>> blocks_;  // of each level
  // For each cut level, the slab of each sample of the turn; and the samples sorted by it, slab s up to slab_end_[s].
  std::vector<uint16_t> slabs_, sorted_;
  std::vector<uint32_t> slab_end_;

  template <typename Visit>
  void add(const DeformInputs<acc_t>& inputs, int64_t query, int64_t sample, SampleBlock<acc_t>& block,
           const Slab& slab, const SlabRows& rows, Visit visit) {
    block.add(query, sample, inputs.locations + sample * 3, inputs.shares[sample]);
    if (block.is_full()) {
      flush(block, slab, rows, visit);
    }
  }

  template <typename Visit>
  void flush(SampleBlock<acc_t>& block, const Slab& slab, const SlabRows& rows, Visit visit) {
    if (block.count() > 0) {
      block.place(slab, rows);
      visit(static_cast<const SampleBlock<acc_t>&>(block));
      block.clear();
    }
  }

  // Visit the samples of the levels that are not cut, and note the slabs of the others.
  template <typename BeginSlab, typename Visit, typename EndSlab>
  void visit_together(const DeformInputs<acc_t>& inputs, const Turn& turn, BeginSlab begin_slab, Visit visit,
                      EndSlab end_slab) {
    std::vector<Slab> slabs(cuts_.size());
    std::vector<SlabRows> rows(cuts_.size());
    int64_t num_sorted = 0;
    for (size_t k = 0; k < cuts_.size(); ++k) {
      if (cuts_[k].is_cut) {
        num_sorted += turn.count() * sizes_.points;
      } else {
        slabs[k] = cuts_[k].slab(0);
        rows[k] = begin_slab(slabs[k]);
      }
    }
    slabs_.resize(num_sorted);
    for (int64_t query = turn.first_query; query < turn.last_query; ++query) {
      const int64_t ahead = std::min(query + 8, turn.last_query - 1);
      inputs.prefetch_samples(turn.first_sample(ahead, sizes_), sizes_.num_samples());
      inputs.prefetch_row(turn.place.item(ahead, sizes_));
      uint16_t* slab_of_point = slabs_.data() + (query - turn.first_query) * sizes_.points;
      for (size_t k = 0; k < cuts_.size(); ++k) {
        const int64_t first = turn.first_sample(query, sizes_) + cuts_[k].number * sizes_.points;
        if (cuts_[k].is_cut) {
          for (int64_t point = 0; point < sizes_.points; ++point) {
            slab_of_point[point] = cuts_[k].slab_of(inputs.locations + (first + point) * 3);
          }
          slab_of_point += turn.count() * sizes_.points;
        } else {
          for (int64_t point = 0; point < sizes_.points; ++point) {
            add(inputs, query, first + point, blocks_[k], slabs[k], rows[k], visit);
          }
        }
      }
    }
    for (size_t k = 0; k < cuts_.size(); ++k) {
      if (!cuts_[k].is_cut) {
        flush(blocks_[k], slabs[k], rows[k], visit);
        end_slab(slabs[k]);
      }
    }
  }

  // Visit the samples of one level slab by slab.
  template <typename BeginSlab, typename Visit, typename EndSlab>
  void visit_slabs(const DeformInputs<acc_t>& inputs, const Turn& turn, const Cut& cut, const uint16_t* slabs,
                   BeginSlab begin_slab, Visit visit, EndSlab end_slab) {
    const uint32_t count = static_cast<uint32_t>(turn.count() * sizes_.points);
    const uint32_t points = static_cast<uint32_t>(sizes_.points);
    sort_by_slab(cut.num_slabs(), slabs, count);
    const auto query_of = [&](uint32_t i) { return turn.first_query + sorted_[i] / points; };
    const auto sample_of = [&](uint32_t i) {
      return turn.first_sample(query_of(i), sizes_) + cut.number * sizes_.points + sorted_[i] % points;
    };
    uint32_t i = 0;
    for (int64_t s = 0; s < cut.num_slabs(); ++s) {
      const Slab slab = cut.slab(s);
      const SlabRows rows = begin_slab(slab);
      for (; i < slab_end_[s]; ++i) {
        const uint32_t ahead = std::min(i + 32, count - 1);
        inputs.prefetch_samples(sample_of(ahead), 1);
        inputs.prefetch_row(turn.place.item(query_of(ahead), sizes_));
        add(inputs, query_of(i), sample_of(i), blocks_[0], slab, rows, visit);
      }
      flush(blocks_[0], slab, rows, visit);
      end_slab(slab);
    }
  }

  // A counting sort.
  void sort_by_slab(int64_t num_slabs, const uint16_t* slabs, uint32_t count) {
    slab_end_.assign(num_slabs + 1, 0);
    for (uint32_t i = 0; i < count; ++i) {
      ++slab_end_[slabs[i] + 1];
    }
    for (int64_t s = 0; s < num_slabs; ++s) {
      slab_end_[s + 1] += slab_end_[s];
    }
    sorted_.resize(count);
    for (uint32_t i = 0; i < count; ++i) {
      sorted_[slab_end_[slabs[i]]++] = static_cast<uint16_t>(i);
    }
  }
};

}  // namespace seg3d
