// Sorting by an unsigned key in linear time, and keys that sort as floating values do.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

namespace seg3d {

template <typename T>
using sort_key_t = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

// Greater values get smaller keys, equal ones the same: -0.0 and 0.0 too. NaN has no place.
template <typename T>
sort_key_t<T> descending_key(T value) {
  using Key = sort_key_t<T>;
  constexpr Key sign = Key(1) << (8 * sizeof(T) - 1);
  const Key bits = value == T(0) ? Key(0) : std::bit_cast<Key>(value);
  return (bits & sign) ? bits : Key(~(bits | sign));
}

template <typename Key>
struct Keyed {
  Key key;
  uint32_t index;
};

// By ascending key; equal keys stay in their order. A digit in which all keys agree costs no pass.
template <typename Key>
void radix_sort(std::vector<Keyed<Key>>& items) {
  constexpr int bits = 11;
  constexpr int num_digits = (8 * sizeof(Key) + bits - 1) / bits;
  constexpr Key mask = (Key(1) << bits) - 1;
  std::vector<std::array<uint32_t, mask + 1>> places(num_digits);
  for (const Keyed<Key>& item : items) {
    for (int digit = 0; digit < num_digits; ++digit) {
      ++places[digit][(item.key >> (digit * bits)) & mask];
    }
  }
  std::vector<Keyed<Key>> moved(items.size());
  for (int digit = 0; digit < num_digits; ++digit) {
    std::array<uint32_t, mask + 1>& place = places[digit];
    if (items.empty() || place[(items[0].key >> (digit * bits)) & mask] == items.size()) {
      continue;
    }
    uint32_t begin = 0;
    for (uint32_t& entry : place) {
      begin += std::exchange(entry, begin);
    }
    for (const Keyed<Key>& item : items) {
      moved[place[(item.key >> (digit * bits)) & mask]++] = item;
    }
    items.swap(moved);
  }
}

}  // namespace seg3d
