// RoIAlign in 3D on CUDA, forward and backward.
//
// Cost: a box reads Z * Y * X voxels a bin, or a line of bins where channels come last, Z, Y, X being the distinct
// voxels that it touches on each axis; the eight corners of every sample are never read apart. The work of a box is
// bounded by the volume, whatever its size. The backward pass does as many atomic sums, in float32 for half types.
// Features and gradients are read and written in place in both memory formats. Nothing waits for the device.
#include <torch/csrc/stable/library.h>

#include "launch.h"
#include "roi_align3d.cuh"

namespace seg3d {
namespace {

// What a call asks for, checked; tensors that the kernels can read as they are.
struct Pooling {
  Tensor boxes;  // in the dtype of the coordinates
  Tensor batch_index;
  PoolGeometry geometry;
  bool channels_last;
};

bool is_double(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double;
}

// Python checks these too, with kinder words; here they keep a direct call of the operator from reading foreign memory.
Pooling check(const Tensor& values, const Tensor& boxes, const Tensor& batch_index, const PoolGeometry& geometry,
              bool channels_last) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 6, "roi_align3d: boxes must have the shape [K, 6]");
  STD_TORCH_CHECK(boxes.scalar_type() == ScalarType::Float || is_double(boxes),
                  "roi_align3d: boxes must be float32 or float64");
  STD_TORCH_CHECK(batch_index.dim() == 1 && batch_index.size(0) == boxes.size(0),
                  "roi_align3d: batch_index must have the shape [K], K = the number of boxes");
  STD_TORCH_CHECK(batch_index.scalar_type() == ScalarType::Long, "roi_align3d: batch_index must be int64");
  STD_TORCH_CHECK(is_same_device(values, boxes) && is_same_device(values, batch_index),
                  "roi_align3d: all tensors must be on the same device");
  STD_TORCH_CHECK(geometry.sampling_ratio >= 0, "roi_align3d: sampling_ratio must be >= 0");
  double bins = 1;
  for (const PoolAxis& axis : {geometry.z, geometry.y, geometry.x}) {
    STD_TORCH_CHECK(axis.size > 0 && axis.out > 0,
                    "roi_align3d: the extents of the features and of the output must be positive");
    bins *= axis.out;
  }
  STD_TORCH_CHECK(bins < 2147483648.0, "roi_align3d: a box must have fewer than 2^31 bins");
  const Tensor coordinates = is_double(values) && !is_double(boxes)
                                 ? torch::stable::to(boxes, std::optional<ScalarType>(ScalarType::Double))
                                 : boxes;
  return {torch::stable::contiguous(coordinates), torch::stable::contiguous(batch_index), geometry, channels_last};
}

PoolAxis pool_axis(int64_t size, int64_t out, double scale) {
  STD_TORCH_CHECK(out < 2147483648, "roi_align3d: a box must have fewer than 2^31 bins");
  return {size, static_cast<int>(out), scale};
}

// One kernel of the four that roi_align3d.cuh has, for a type of values and of coordinates and a width of rows.
// Coordinates in float64 with other values are rare, so they have the plain width only.
template <typename scalar_t, template <int, typename, typename> typename Kernel, typename... Arguments>
void launch(const Pooling& pooling, bool wide, int64_t blocks_of, int64_t per_block, const Tensor& source,
            Arguments... arguments) {
  const unsigned blocks = num_blocks(blocks_of, per_block);
  const cudaStream_t stream = current_stream(source);
  const auto run = [&](auto kernel, auto coordinate) {
    kernel<<<blocks, kPoolThreads, 0, stream>>>(data<scalar_t>(source), data<decltype(coordinate)>(pooling.boxes),
                                                data<int64_t>(pooling.batch_index), pooling.geometry, arguments...);
  };
  constexpr int row = kRow<scalar_t>;
  if constexpr (std::is_same_v<scalar_t, double>) {
    wide ? run(Kernel<row, double, double>::value, double{}) : run(Kernel<1, double, double>::value, double{});
  } else if (is_double(pooling.boxes)) {
    run(Kernel<1, scalar_t, double>::value, double{});
  } else {
    wide ? run(Kernel<row, scalar_t, float>::value, float{}) : run(Kernel<1, scalar_t, float>::value, float{});
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <int width, typename scalar_t, typename coord_t>
struct PoolLast {
  static constexpr auto value = pool_channels_last<width, scalar_t, coord_t>;
};
template <int width, typename scalar_t, typename coord_t>
struct PoolFirst {
  static constexpr auto value = pool_channels_first<width, scalar_t, coord_t>;
};
template <int width, typename scalar_t, typename coord_t>
struct UnpoolLast {
  // There is no atomic sum of several float64 values.
  static constexpr int sum_width = std::is_same_v<scalar_t, double> ? 1 : width;
  static constexpr auto value = unpool_channels_last<sum_width, scalar_t, coord_t>;
};
template <int width, typename scalar_t, typename coord_t>
struct UnpoolFirst {
  static constexpr auto value = unpool_channels_first<width, scalar_t, coord_t>;
};

// Rows of several channels keep more than half of a warp busy only from so many channels on.
template <typename scalar_t, typename acc_t>
bool takes_rows(int64_t channels, const scalar_t* values, const acc_t* sums) {
  constexpr int row = kRow<scalar_t>;
  return channels % row == 0 && channels >= 16 * row && is_aligned(values, row * sizeof(scalar_t)) &&
         is_aligned(sums, row * sizeof(acc_t));
}

int64_t num_lines(const PoolGeometry& geometry) {
  return geometry.num_boxes * geometry.z.out * geometry.y.out;
}

Tensor empty_volumes(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype, bool channels_last) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype,
                              std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast3d : MemoryFormat::Contiguous);
}

Tensor roi_align3d(const Tensor& features, const Tensor& boxes, const Tensor& batch_index, int64_t out_d, int64_t out_h,
                   int64_t out_w, double scale_z, double scale_y, double scale_x, int64_t sampling_ratio,
                   bool aligned) {
  STD_TORCH_CHECK(features.dim() == 5, "roi_align3d: features must have the shape [N, C, D, H, W]");
  const int64_t channels = features.size(1);
  const Pooling pooling = check(
      features, boxes, batch_index,
      {pool_axis(features.size(2), out_d, scale_z), pool_axis(features.size(3), out_h, scale_y),
       pool_axis(features.size(4), out_w, scale_x), features.size(0), channels, boxes.size(0), sampling_ratio, aligned},
      is_channels_last(features));
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const Tensor output = empty_volumes(features, {boxes.size(0), channels, out_d, out_h, out_w}, features.scalar_type(),
                                      pooling.channels_last);
  if (output.numel() == 0) {
    return output;
  }
  const Tensor source = in_format(features, pooling.channels_last);
  dispatch_floating(features.scalar_type(), "roi_align3d: features", [&](auto zero) {
    using scalar_t = decltype(zero);
    scalar_t* out = mutable_data<scalar_t>(output);
    if (pooling.channels_last) {
      launch<scalar_t, PoolLast>(pooling, takes_rows(channels, data<scalar_t>(source), out),
                                 num_lines(pooling.geometry), kPoolWarps, source, out);
    } else {
      launch<scalar_t, PoolFirst>(pooling, channels > 1, num_tiles(pooling.geometry), 1, source, out);
    }
  });
  return output;
}

Tensor roi_align3d_backward(const Tensor& grad, const Tensor& boxes, const Tensor& batch_index, int64_t batch,
                            int64_t depth, int64_t height, int64_t width, double scale_z, double scale_y,
                            double scale_x, int64_t sampling_ratio, bool aligned, bool channels_last) {
  STD_TORCH_CHECK(grad.dim() == 5 && grad.size(0) == boxes.size(0),
                  "roi_align3d_backward: grad must have the shape [K, C, d, h, w], K = the number of boxes");
  const int64_t channels = grad.size(1);
  // One channel is the same in both formats; its kernel is the one for channels first.
  const Pooling pooling =
      check(grad, boxes, batch_index,
            {pool_axis(depth, grad.size(2), scale_z), pool_axis(height, grad.size(3), scale_y),
             pool_axis(width, grad.size(4), scale_x), batch, channels, boxes.size(0), sampling_ratio, aligned},
            channels_last && channels > 1);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const bool is_half = grad.scalar_type() == ScalarType::BFloat16 || grad.scalar_type() == ScalarType::Half;
  Tensor sums = empty_volumes(grad, {batch, channels, depth, height, width},
                              is_half ? ScalarType::Float : grad.scalar_type(), channels_last);
  torch::stable::zero_(sums);
  if (grad.numel() > 0 && sums.numel() > 0) {
    const Tensor source = in_format(grad, pooling.channels_last);
    dispatch_floating(grad.scalar_type(), "roi_align3d_backward: grad", [&](auto zero) {
      using scalar_t = decltype(zero);
      auto* out = mutable_data<accumulate_t<scalar_t>>(sums);
      if (pooling.channels_last) {
        const bool wide = can_add_rows(source) && takes_rows(channels, data<scalar_t>(source), out);
        launch<scalar_t, UnpoolLast>(pooling, wide, num_lines(pooling.geometry), kPoolWarps, source, out);
      } else {
        launch<scalar_t, UnpoolFirst>(pooling, channels > 1, num_tiles(pooling.geometry), 1, source, out);
      }
    });
  }
  return is_half ? torch::stable::to(sums, std::optional<ScalarType>(grad.scalar_type())) : sums;
}

}  // namespace
}  // namespace seg3d

STABLE_TORCH_LIBRARY_IMPL(seg3d, CUDA, m) {
  m.impl("roi_align3d", TORCH_BOX(&seg3d::roi_align3d));
  m.impl("roi_align3d_backward", TORCH_BOX(&seg3d::roi_align3d_backward));
}
