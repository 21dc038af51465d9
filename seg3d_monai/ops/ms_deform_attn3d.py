"""Multi-scale deformable attention (Zhu et al., Deformable DETR, 2021) in 3D: the Python function."""

import torch
from torch import Tensor

from seg3d_monai.ops.arguments import FLOATING, check_tensor, values_are_readable


def ms_deform_attn3d(
    value: Tensor, spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sum, for every query and head, trilinear samples of all levels, weighted by attention.

    Each sample is grid_sample's with align_corners=False and padding_mode="zeros": location l on an axis of n voxels
    lies at l * n - 0.5, and voxels outside count as 0. A location that is NaN, or far outside, reads nothing.

    Coordinates, weights and sums are float64 for a float64 value, else float32, also under autocast; the result has
    the dtype of `value`. Differentiable once in value, locations and weights.

    Args:
        value: [N, S, M, Dh], M heads of Dh channels; S rows are the voxels of all levels, level after level, each in
            the order z, y, x. float64, float32, bfloat16 or float16.
        spatial_shapes: [L, 3], int64, (d, h, w) of each level; S = sum of d * h * w. Best on the CPU, also for a value
            on a GPU: kernels need it on the host.
        sampling_locations: [N, Lq, M, L, P, 3], floating, (z, y, x) in [0, 1] from one border of a level to the other.
        attention_weights: [N, Lq, M, L, P], floating, usually with a sum of 1 over (L, P).

    Returns:
        [N, Lq, M * Dh] in the dtype of `value`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not fit each other, or tensors are on different devices.
    """
    check_tensor("value", value, "N, S, M, Dh", FLOATING)
    check_tensor("spatial_shapes", spatial_shapes, "L, 3", (torch.int64,))
    check_tensor("sampling_locations", sampling_locations, "N, Lq, M, L, P, 3", FLOATING)
    check_tensor("attention_weights", attention_weights, "N, Lq, M, L, P", FLOATING)
    if spatial_shapes.shape[1] != 3:
        raise ValueError(f"spatial_shapes must have the shape [L, 3] = (d, h, w), got {tuple(spatial_shapes.shape)}")
    n, rows, heads, _ = value.shape
    expected = (n, sampling_locations.shape[1], heads, spatial_shapes.shape[0], sampling_locations.shape[4], 3)
    if tuple(sampling_locations.shape) != expected:
        raise ValueError(
            f"sampling_locations must have the shape [N, Lq, M, L, P, 3] with N, M = {n}, {heads} of value and "
            f"L = {expected[3]} of spatial_shapes, got {tuple(sampling_locations.shape)}"
        )
    if tuple(attention_weights.shape) != expected[:5]:
        raise ValueError(
            f"attention_weights must have the shape {expected[:5]} of sampling_locations, "
            f"got {tuple(attention_weights.shape)}"
        )
    for name, tensor in (("sampling_locations", sampling_locations), ("attention_weights", attention_weights)):
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device}, value on {value.device}; move them to one device")
    if values_are_readable(spatial_shapes):
        if bool((spatial_shapes < 1).any()):
            raise ValueError(f"spatial_shapes must be >= 1, got {spatial_shapes.tolist()}")
        if int(spatial_shapes.prod(1).sum()) != rows:
            raise ValueError(
                f"value has S = {rows} rows, but the levels {spatial_shapes.tolist()} have "
                f"{int(spatial_shapes.prod(1).sum())} voxels together"
            )
    dtype = torch.promote_types(value.dtype, torch.float32)
    return torch.ops.seg3d.ms_deform_attn3d(
        value, spatial_shapes, sampling_locations.to(dtype), attention_weights.to(dtype)
    )
