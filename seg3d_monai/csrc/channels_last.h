// What counts as channels last, on every device and in ops/reference.py: it decides the memory format of results.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace seg3d {

// Whether the channels of a tensor [N, C, D, H, W] lie side by side in memory, and not the voxels.
inline bool is_channels_last(const torch::stable::Tensor& volumes) {
  return volumes.size(1) > 1 && volumes.stride(1) == 1 && volumes.stride(4) != 1;
}

}  // namespace seg3d
