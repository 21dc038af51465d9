// Mean and variance of a run of memory, measured in pieces and joined in float64.
//
// Values are shifted by the first one of their run before anything is summed, so runs far from zero lose nothing. A
// piece fits the first-level cache and is read twice, for its mean and for the squares of the distances from that. Its
// bounds depend on nothing but the length of the run.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/lanes.h"
#include "cpu/norm.h"

namespace seg3d {

constexpr int64_t kPiece = 8192;  // numbers

// A run of memory in pieces of kPiece numbers; the last one may be shorter.
template <typename acc_t>
class Run {
 public:
  explicit Run(int64_t length) : length_(length), rest_(length % width) {}

  int64_t length() const { return length_; }
  int64_t num_pieces() const { return (length_ + kPiece - 1) / kPiece; }
  int64_t count(int64_t piece) const { return std::min(kPiece, length_ - piece * kPiece); }

  // Call visit(place in the run, WholePair or PartOfPair) from the first to the last of a piece.
  template <typename Visit>
  void for_each_pair(int64_t piece, Visit visit) const {
    const int64_t end = piece * kPiece + count(piece);
    int64_t place = piece * kPiece;
    for (; place + width <= end; place += width) {
      visit(place, WholePair<acc_t>{});
    }
    if (place < end) {
      visit(place, rest_);
    }
  }

 private:
  static constexpr int64_t width = 2 * num_lanes<acc_t>;
  static_assert(kPiece % width == 0);
  int64_t length_;
  PartOfPair<acc_t> rest_;
};

struct Moments {
  double mean, squares;
};

// Mean and sum of squared distances from it, of the distances of a piece's values from the segment's first.
template <typename scalar_t, typename acc_t>
Moments measure_piece(const scalar_t* values, const Run<acc_t>& run, int64_t piece) {
  const acc_t first = static_cast<acc_t>(values[0]), count = static_cast<acc_t>(run.count(piece));
  Vec<acc_t> sum[2] = {}, squares[2] = {};
  const auto add = [&](acc_t middle, bool has_squares) {
    run.for_each_pair(piece, [&](int64_t place, const auto& pair) {
      Vec<acc_t> x[2];
      pair.load(values + place, x[0], x[1]);
      for (Vec<acc_t>& part : x) {
        part = part - first - middle;
      }
      pair.clear_rest(x[0], x[1]);
      for (int half = 0; half < 2; ++half) {
        sum[half] += x[half];
        if (has_squares) {
          squares[half] += x[half] * x[half];
        }
      }
    });
  };
  add(0, false);
  const acc_t middle = sum_of_lanes<acc_t>(sum[0] + sum[1]) / count;
  sum[0] = sum[1] = Vec<acc_t>{};
  add(middle, true);
  const double rest = sum_of_lanes<acc_t>(sum[0] + sum[1]) / count;  // what the rounding of the middle left
  return {middle + rest, sum_of_lanes<acc_t>(squares[0] + squares[1]) - rest * rest * count};
}

// Moments of a segment from those of its pieces.
template <typename acc_t>
Moments join_pieces(const Moments* pieces, const Run<acc_t>& run) {
  Moments joined{0, 0};
  for (int64_t i = 0; i < run.num_pieces(); ++i) {
    joined.mean += pieces[i].mean * static_cast<double>(run.count(i));
  }
  joined.mean /= static_cast<double>(run.length());
  for (int64_t i = 0; i < run.num_pieces(); ++i) {
    const double distance = pieces[i].mean - joined.mean;
    joined.squares += pieces[i].squares + distance * distance * static_cast<double>(run.count(i));
  }
  return joined;
}

}  // namespace seg3d
