// Loads, stores and atomic sums of neighbouring values, as one instruction each where the hardware has one.
//
// It knows nothing of torch, and of the types of values only that float or double converts to and from them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace seg3d {

template <typename scalar_t>
using accumulate_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// The widest row that one instruction loads: 16 bytes of float32 or float64, 8 bytes of half types.
template <typename scalar_t>
constexpr int kRow = std::is_same_v<scalar_t, double> ? 2 : 4;

template <int bytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// `from` is aligned to the whole row, and nothing writes there while the kernel runs.
template <int width, typename scalar_t>
__device__ inline void load_row(const scalar_t* from, accumulate_t<scalar_t> (&values)[width]) {
  using word_t = typename Word<width * sizeof(scalar_t)>::type;
  const word_t word = __ldg(reinterpret_cast<const word_t*>(from));
  scalar_t row[width];
  memcpy(&row, &word, sizeof(word));
#pragma unroll
  for (int i = 0; i < width; ++i) {
    values[i] = static_cast<accumulate_t<scalar_t>>(row[i]);
  }
}

// Written once and not read again by the kernel, so it need not stay in the caches.
template <int width, typename scalar_t>
__device__ inline void store_row(scalar_t* to, const accumulate_t<scalar_t> (&values)[width]) {
  using word_t = typename Word<width * sizeof(scalar_t)>::type;
  scalar_t row[width];
#pragma unroll
  for (int i = 0; i < width; ++i) {
    row[i] = static_cast<scalar_t>(values[i]);
  }
  word_t word;
  memcpy(&word, &row, sizeof(word));
  __stcs(reinterpret_cast<word_t*>(to), word);
}

// The sum of a row of four in one instruction exists from compute capability 9.0 on.
template <int width, typename acc_t>
__device__ inline void add_row(acc_t* to, acc_t weight, const acc_t (&values)[width]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (width == 4 && std::is_same_v<acc_t, float>) {
    atomicAdd(reinterpret_cast<float4*>(to),
              float4{weight * values[0], weight * values[1], weight * values[2], weight * values[3]});
  } else
#endif
  {
#pragma unroll
    for (int i = 0; i < width; ++i) {
      atomicAdd(to + i, weight * values[i]);
    }
  }
}

}  // namespace seg3d
