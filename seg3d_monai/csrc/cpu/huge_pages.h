// Ask the system for huge pages behind a large new tensor.
//
// A fresh tensor of hundreds of megabytes costs one page fault every 4 KB when it is written the first time, which
// takes longer than to compute it. Linux maps 2 MB at once where it is asked to; elsewhere nothing happens.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace seg3d {

inline void advise_huge_pages([[maybe_unused]] const torch::stable::Tensor& tensor) {
#if defined(__linux__)
  constexpr uintptr_t huge = uintptr_t(1) << 21, least = 32 * huge;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(tensor.numel() * tensor.element_size());
  // Whole huge pages only: what lies around the tensor belongs to others.
  const uintptr_t first = (begin + huge - 1) / huge * huge, last = end / huge * huge;
  if (first < last && last - first >= least) {
    // It is advice: where it is refused, small pages serve.
    (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
}

}  // namespace seg3d
