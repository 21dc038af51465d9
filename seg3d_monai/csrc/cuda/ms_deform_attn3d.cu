// Multi-scale deformable attention in 3D on CUDA, forward and backward.
//
// Cost: a sample reads eight rows of Dh channels, once each; nothing is stored between. The backward pass reads the
// same rows and adds to as many, four float32 channels in one atomic sum where the device can (compute capability 9.0).
// Locations and weights get their gradients without atomics. Nothing waits for the device, unless spatial_shapes lies
// there: the host must know the shapes.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "launch.h"
#include "ms_deform_attn3d.cuh"

namespace seg3d {
namespace {

Tensor as_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, std::optional<ScalarType>(dtype));
}

bool is_floating(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  return dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

// The tensors of a call, checked and as the kernels read them: locations and weights in the dtype of the sums.
struct Attention {
  Tensor value, locations, weights;
  AttendGeometry geometry;

  int64_t num_rows() const { return geometry.num_images * geometry.num_queries * geometry.heads; }
};

AttendGeometry geometry_of(const Tensor& value, const Tensor& spatial_shapes, const Tensor& locations) {
  const int64_t levels = spatial_shapes.size(0);
  STD_TORCH_CHECK(levels <= kMaxLevels, "ms_deform_attn3d: at most ", kMaxLevels, " levels on CUDA, got ", levels);
  constexpr int64_t most = 1 << 26;  // so that indices of heads, channels and samples of a query fit in 32 bits
  STD_TORCH_CHECK(value.size(2) < most && value.size(3) < most && locations.size(4) < most,
                  "ms_deform_attn3d: heads, channels and points must be fewer than ", most);
  AttendGeometry geometry{};
  geometry.num_images = value.size(0);
  geometry.num_queries = locations.size(1);
  geometry.num_values = value.size(1);
  geometry.heads = static_cast<int>(value.size(2));
  geometry.channels = static_cast<int>(value.size(3));
  geometry.levels = static_cast<int>(levels);
  geometry.points = static_cast<int>(locations.size(4));
  const Tensor host = torch::stable::contiguous(
      spatial_shapes.is_cpu()
          ? spatial_shapes
          : torch::stable::to(spatial_shapes, torch::stable::Device(torch::headeronly::DeviceType::CPU)));
  const int64_t* shapes = data<int64_t>(host);
  int64_t start = 0;
  for (int64_t level = 0; level < levels; ++level) {
    const int64_t depth = shapes[level * 3], height = shapes[level * 3 + 1], width = shapes[level * 3 + 2];
    STD_TORCH_CHECK(depth > 0 && height > 0 && width > 0, "ms_deform_attn3d: spatial_shapes[", level,
                    "] must be positive");
    geometry.start[level] = start;
    geometry.depth[level] = depth;
    geometry.height[level] = height;
    geometry.width[level] = width;
    // Compared without products that could overflow.
    const int64_t left = geometry.num_values - start;
    STD_TORCH_CHECK(depth <= left && height <= left / depth && width <= left / depth / height,
                    "ms_deform_attn3d: spatial_shapes describe more voxels than value has, ", geometry.num_values);
    start += depth * height * width;
  }
  STD_TORCH_CHECK(start == geometry.num_values, "ms_deform_attn3d: spatial_shapes describe ", start,
                  " voxels, value has ", geometry.num_values);
  return geometry;
}

// Python checks these too, with kinder words; here they keep a direct call of the operator from reading foreign memory.
Attention check(const Tensor& value, const Tensor& spatial_shapes, const Tensor& locations, const Tensor& weights) {
  STD_TORCH_CHECK(value.dim() == 4, "ms_deform_attn3d: value must have the shape [N, S, M, Dh]");
  STD_TORCH_CHECK(
      spatial_shapes.dim() == 2 && spatial_shapes.size(1) == 3 && spatial_shapes.scalar_type() == ScalarType::Long,
      "ms_deform_attn3d: spatial_shapes must be int64 of the shape [L, 3]");
  STD_TORCH_CHECK(locations.dim() == 6 && locations.size(0) == value.size(0) && locations.size(2) == value.size(2) &&
                      locations.size(3) == spatial_shapes.size(0) && locations.size(5) == 3,
                  "ms_deform_attn3d: sampling_locations must have the shape [N, Lq, M, L, P, 3]");
  STD_TORCH_CHECK(weights.dim() == 5, "ms_deform_attn3d: attention_weights must have the shape [N, Lq, M, L, P]");
  for (int axis = 0; axis < 5; ++axis) {
    STD_TORCH_CHECK(weights.size(axis) == locations.size(axis),
                    "ms_deform_attn3d: attention_weights must have the shape [N, Lq, M, L, P] of sampling_locations");
  }
  STD_TORCH_CHECK(is_floating(value) && is_floating(locations) && is_floating(weights),
                  "ms_deform_attn3d: value, locations and weights must be float64, float32, bfloat16 or float16");
  STD_TORCH_CHECK(is_same_device(value, locations) && is_same_device(value, weights),
                  "ms_deform_attn3d: value, locations and weights must be on the same device");
  STD_TORCH_CHECK(spatial_shapes.is_cpu() || is_same_device(value, spatial_shapes),
                  "ms_deform_attn3d: spatial_shapes must be on the CPU or on the device of value");
  const ScalarType sums = value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return {torch::stable::contiguous(value), torch::stable::contiguous(as_dtype(locations, sums)),
          torch::stable::contiguous(as_dtype(weights, sums)), geometry_of(value, spatial_shapes, locations)};
}

// Lanes for a row of channels: a power of two, so that groups fill a warp.
int group_size(int channels, int width) {
  int group = 1;
  while (group < 32 && group * width < channels) {
    group *= 2;
  }
  return group;
}

// Call `run` with the width of the rows that the kernel is to load.
template <typename scalar_t, typename Run>
void with_width(Attention& attention, bool is_wide, Run run) {
  constexpr int row = kRow<scalar_t>;
  const bool wide = is_wide && attention.geometry.channels % row == 0;
  attention.geometry.group = group_size(attention.geometry.channels, wide ? row : 1);
  wide ? run(std::integral_constant<int, row>{}) : run(std::integral_constant<int, 1>{});
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

unsigned blocks_of(const Attention& attention) {
  return num_blocks(attention.num_rows(), kAttendThreads / attention.geometry.group);
}

Tensor ms_deform_attn3d(const Tensor& value, const Tensor& spatial_shapes, const Tensor& locations,
                        const Tensor& weights) {
  STD_TORCH_CHECK(value.is_cuda(), "ms_deform_attn3d: value must be on a CUDA device");
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  Attention attention = check(value, spatial_shapes, locations, weights);
  const AttendGeometry& geometry = attention.geometry;
  Tensor output = torch::stable::new_empty(
      value, {geometry.num_images, geometry.num_queries, int64_t(geometry.heads) * geometry.channels});
  if (output.numel() == 0) {
    return output;
  }
  const cudaStream_t stream = current_stream(value);
  dispatch_floating(value.scalar_type(), "ms_deform_attn3d: value", [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto* values = data<scalar_t>(attention.value);
    const bool is_wide = is_aligned(values, kRow<scalar_t> * sizeof(scalar_t));
    with_width<scalar_t>(attention, is_wide, [&](auto width) {
      attend<width.value, scalar_t><<<blocks_of(attention), kAttendThreads, 0, stream>>>(
          values, data<accumulate_t<scalar_t>>(attention.locations), data<accumulate_t<scalar_t>>(attention.weights),
          geometry, mutable_data<scalar_t>(output));
    });
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn3d_backward(const Tensor& grad, const Tensor& value,
                                                             const Tensor& spatial_shapes, const Tensor& locations,
                                                             const Tensor& weights) {
  STD_TORCH_CHECK(value.is_cuda(), "ms_deform_attn3d_backward: value must be on a CUDA device");
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  Attention attention = check(value, spatial_shapes, locations, weights);
  const AttendGeometry& geometry = attention.geometry;
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == geometry.num_images && grad.size(1) == geometry.num_queries &&
                      grad.size(2) == int64_t(geometry.heads) * geometry.channels &&
                      grad.scalar_type() == value.scalar_type() && is_same_device(grad, value),
                  "ms_deform_attn3d_backward: grad must have the shape [N, Lq, M * Dh], dtype and device of value");
  const Tensor grads = torch::stable::contiguous(grad);
  const Tensor grad_value =
      torch::stable::new_zeros(attention.value, attention.value.sizes(), attention.weights.scalar_type());
  const Tensor grad_locations = torch::stable::new_empty(attention.locations, attention.locations.sizes());
  const Tensor grad_weights = torch::stable::new_empty(attention.weights, attention.weights.sizes());
  if (grad_weights.numel() > 0) {
    const cudaStream_t stream = current_stream(value);
    dispatch_floating(value.scalar_type(), "ms_deform_attn3d: value", [&](auto zero) {
      using scalar_t = decltype(zero);
      using acc_t = accumulate_t<scalar_t>;
      const auto* values = data<scalar_t>(attention.value);
      auto* sums = mutable_data<acc_t>(grad_value);
      constexpr int row = kRow<scalar_t>;
      // There is no atomic sum of several float64 values.
      const bool is_wide =
          !std::is_same_v<scalar_t, double> && can_add_rows(value) && is_aligned(values, row * sizeof(scalar_t)) &&
          is_aligned(data<scalar_t>(grads), row * sizeof(scalar_t)) && is_aligned(sums, row * sizeof(acc_t));
      with_width<scalar_t>(attention, is_wide, [&](auto width) {
        constexpr int sum_width = std::is_same_v<scalar_t, double> ? 1 : width.value;
        attend_backward<sum_width, scalar_t><<<blocks_of(attention), kAttendThreads, 0, stream>>>(
            data<scalar_t>(grads), values, data<accumulate_t<scalar_t>>(attention.locations),
            data<acc_t>(attention.weights), geometry, sums, mutable_data<acc_t>(grad_locations),
            mutable_data<acc_t>(grad_weights));
      });
    });
  }
  return {as_dtype(grad_value, value.scalar_type()), as_dtype(grad_locations, locations.scalar_type()),
          as_dtype(grad_weights, weights.scalar_type())};
}

}  // namespace
}  // namespace seg3d

STABLE_TORCH_LIBRARY_IMPL(seg3d, CUDA, m) {
  m.impl("ms_deform_attn3d", TORCH_BOX(&seg3d::ms_deform_attn3d));
  m.impl("ms_deform_attn3d_backward", TORCH_BOX(&seg3d::ms_deform_attn3d_backward));
}
