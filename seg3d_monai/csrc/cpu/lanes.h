// A short vector of 64 bytes, the unit of work of the CPU kernels: 16 float32 or 8 float64 lanes.
//
// Built on the vector extension of GCC and Clang, which exists for every processor: where registers are narrower, a
// vector takes several. Storage types are widened to the type that sums are kept in when they are loaded.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace seg3d {

// The type that sums of a storage type are kept in.
template <typename scalar_t>
using accumulate_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename acc_t>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(64)));
  typedef int32_t index __attribute__((vector_size(64)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(64)));
  typedef int64_t index __attribute__((vector_size(64)));
};
template <typename acc_t>
using Vec = typename VecOf<acc_t>::type;
typedef int64_t Offsets __attribute__((vector_size(64)));

template <typename acc_t>
inline constexpr int64_t num_lanes = 64 / sizeof(acc_t);

// Memory that starts at a cache line; what it held is lost when it grows.
template <typename T>
class AlignedBuffer {
 public:
  T* reserve(int64_t count) {
    const size_t lines = (static_cast<size_t>(count) * sizeof(T) + sizeof(Line) - 1) / sizeof(Line);
    if (lines > lines_.size()) {
      lines_.resize(lines);
    }
    return reinterpret_cast<T*>(lines_.data());
  }

 private:
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  std::vector<Line> lines_;
};

// The lanes part * 8 .. part * 8 + 7 of an index vector, as offsets of 64 bits.
template <typename index_t>
inline Offsets widen(const index_t& index, int64_t part) {
  if constexpr (sizeof(index[0]) == 8) {
    return (Offsets)index;
  } else {
    typedef int32_t Narrow __attribute__((vector_size(32)));
    Narrow narrow;
    std::memcpy(&narrow, reinterpret_cast<const std::byte*>(&index) + part * sizeof(narrow), sizeof(narrow));
    return __builtin_convertvector(narrow, Offsets);
  }
}

template <typename acc_t, typename scalar_t>
inline Vec<acc_t> load_lanes(const scalar_t* source) {
  Vec<acc_t> lanes;
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    std::memcpy(&lanes, source, sizeof(lanes));
  } else if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
    // A bfloat16 is the upper half of a float32.
    typedef uint16_t Narrow __attribute__((vector_size(32)));
    typedef uint32_t Wide __attribute__((vector_size(64)));
    Narrow narrow;
    std::memcpy(&narrow, source, sizeof(narrow));
    const Wide bits = __builtin_convertvector(narrow, Wide) << 16;
    std::memcpy(&lanes, &bits, sizeof(lanes));
  } else {
    for (int64_t i = 0; i < num_lanes<acc_t>; ++i) {
      lanes[i] = static_cast<acc_t>(source[i]);
    }
  }
  return lanes;
}

// Load `count` <= num_lanes values; the other lanes are zero.
template <typename acc_t, typename scalar_t>
inline Vec<acc_t> load_some_lanes(const scalar_t* source, int64_t count) {
  if (count == num_lanes<acc_t>) {
    return load_lanes<acc_t>(source);
  }
  Vec<acc_t> lanes = {};
  for (int64_t i = 0; i < count; ++i) {
    lanes[i] = static_cast<acc_t>(source[i]);
  }
  return lanes;
}

// float32 as bfloat16 in the upper halves: to the nearest, ties to even; a NaN stays one.
inline auto bfloat16_bits(Vec<float> lanes) {
  typedef uint32_t Wide __attribute__((vector_size(64)));
  const Wide bits = (Wide)lanes;
  const Wide rounded = bits + (0x7fffu + ((bits >> 16) & 1u));
  const Wide is_number = (Wide)(lanes == lanes);
  return (rounded & is_number) | (0x7fc00000u & ~is_number);
}

template <typename acc_t, typename scalar_t>
inline void store_lanes(scalar_t* target, Vec<acc_t> lanes) {
  if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
    typedef uint16_t Narrow __attribute__((vector_size(32)));
    const Narrow narrow = __builtin_convertvector(bfloat16_bits(lanes) >> 16, Narrow);
    std::memcpy(target, &narrow, sizeof(narrow));
  } else if constexpr (std::is_same_v<scalar_t, acc_t>) {
    std::memcpy(target, &lanes, sizeof(lanes));
  } else {
    for (int64_t i = 0; i < num_lanes<acc_t>; ++i) {
      target[i] = static_cast<scalar_t>(lanes[i]);
    }
  }
}

// Store the first `count` <= num_lanes values.
template <typename acc_t, typename scalar_t>
inline void store_some_lanes(scalar_t* target, Vec<acc_t> lanes, int64_t count) {
  if (count == num_lanes<acc_t>) {
    return store_lanes<acc_t>(target, lanes);
  }
  for (int64_t i = 0; i < count; ++i) {
    target[i] = static_cast<scalar_t>(lanes[i]);
  }
}

// Load 2 * num_lanes neighbouring values: in their order, except that bfloat16 gives the even ones, then the odd ones,
// which takes one instruction each. `store_pair` is the inverse.
template <typename acc_t, typename scalar_t>
inline void load_pair(const scalar_t* source, Vec<acc_t>& first, Vec<acc_t>& second) {
  if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
    typedef uint32_t Wide __attribute__((vector_size(64)));
    Wide both;
    std::memcpy(&both, source, sizeof(both));
    first = (Vec<acc_t>)(both << 16);
    second = (Vec<acc_t>)(both & 0xffff0000u);
  } else {
    first = load_lanes<acc_t>(source);
    second = load_lanes<acc_t>(source + num_lanes<acc_t>);
  }
}

template <typename acc_t, typename scalar_t>
inline void store_pair(scalar_t* target, Vec<acc_t> first, Vec<acc_t> second) {
  if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
    typedef uint32_t Wide __attribute__((vector_size(64)));
    const Wide both = (bfloat16_bits(first) >> 16) | (bfloat16_bits(second) & 0xffff0000u);
    std::memcpy(target, &both, sizeof(both));
  } else {
    store_lanes<acc_t>(target, first);
    store_lanes<acc_t>(target + num_lanes<acc_t>, second);
  }
}

namespace detail {

// Lanes of two vectors by their places in `a` followed by `b`.
template <typename acc_t, int64_t... place>
inline Vec<acc_t> pick_lanes(Vec<acc_t> a, Vec<acc_t> b, std::integer_sequence<int64_t, place...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, place...);
#else
  return __builtin_shuffle(a, b, typename VecOf<acc_t>::index{place...});
#endif
}

template <typename acc_t, int64_t half, int64_t... lane>
inline void swap_off_diagonal(Vec<acc_t>& upper, Vec<acc_t>& lower, std::integer_sequence<int64_t, lane...>) {
  constexpr int64_t lanes = num_lanes<acc_t>;
  const Vec<acc_t> a = upper, b = lower;
  upper = pick_lanes<acc_t>(a, b, std::integer_sequence<int64_t, (lane & half ? lanes + lane - half : lane)...>{});
  lower = pick_lanes<acc_t>(a, b, std::integer_sequence<int64_t, (lane & half ? lanes + lane : lane + half)...>{});
}

template <typename acc_t, int64_t half>
inline void transpose_blocks(Vec<acc_t>* rows) {
  if constexpr (half > 0) {
    for (int64_t i = 0; i < num_lanes<acc_t>; ++i) {
      if ((i & half) == 0) {
        constexpr std::make_integer_sequence<int64_t, num_lanes<acc_t>> all_lanes{};
        swap_off_diagonal<acc_t, half>(rows[i], rows[i + half], all_lanes);
      }
    }
    transpose_blocks<acc_t, half / 2>(rows);
  }
}

}  // namespace detail

// Transpose a square of num_lanes vectors in place: halves of the square are swapped over its diagonal, then quarters.
template <typename acc_t>
inline void transpose(Vec<acc_t>* rows) {
  detail::transpose_blocks<acc_t, num_lanes<acc_t> / 2>(rows);
}

// The sum over the lanes of each row, as lane i for row i. The rows are lost.
template <typename acc_t, int64_t half = num_lanes<acc_t> / 2>
inline Vec<acc_t> sums_of_rows(Vec<acc_t>* rows) {
  constexpr std::make_integer_sequence<int64_t, num_lanes<acc_t>> all_lanes{};
  for (int64_t i = 0; i < half; ++i) {
    detail::swap_off_diagonal<acc_t, half>(rows[i], rows[i + half], all_lanes);
    rows[i] += rows[i + half];
  }
  if constexpr (half > 1) {
    return sums_of_rows<acc_t, half / 2>(rows);
  }
  return rows[0];
}

}  // namespace seg3d
