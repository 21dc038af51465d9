// What every CUDA operator needs on the host: device and stream of a tensor, sizes of grids, the dtype as a type.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "channels_last.h"
#include "dispatch.h"

namespace seg3d {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Blocks for so many items. Kernels stride over the grid, so the hardware's limit costs nothing.
inline unsigned num_blocks(int64_t items, int64_t items_per_block) {
  const int64_t wanted = (items + items_per_block - 1) / items_per_block;
  return static_cast<unsigned>(std::min<int64_t>(wanted, std::numeric_limits<int32_t>::max()));
}

inline bool is_same_device(const Tensor& tensor, const Tensor& other) {
  return tensor.is_cuda() && other.is_cuda() && tensor.get_device_index() == other.get_device_index();
}

// Whether the device adds four float32 values to memory at once. Where it cannot, lanes that hold four neighbouring
// channels each would spread every atomic sum over four times the memory, so they had better hold one.
inline bool can_add_rows(const Tensor& tensor) {
  int major = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, tensor.get_device_index()));
  return major >= 9;
}

// The tensor itself if it is dense in the format asked for, else a copy.
inline Tensor in_format(const Tensor& tensor, bool channels_last) {
  return torch::stable::contiguous(tensor, channels_last ? MemoryFormat::ChannelsLast3d : MemoryFormat::Contiguous);
}

// A row of values can be loaded at once where it starts at a multiple of its own size.
inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <typename scalar_t>
const scalar_t* data(const Tensor& tensor) {
  return static_cast<const scalar_t*>(tensor.const_data_ptr());
}

template <typename scalar_t>
scalar_t* mutable_data(const Tensor& tensor) {
  return static_cast<scalar_t*>(tensor.mutable_data_ptr());
}

}  // namespace seg3d
