"""RoIAlign in 3D (He et al., Mask R-CNN, 2017, carried from torchvision's 2D operator): the Python function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from seg3d_monai.ops.arguments import (
    FLOATING,
    check_boxes,
    check_device,
    check_length,
    check_tensor,
    check_values_finite,
    three_scales,
    three_sizes,
    values_are_readable,
)


def roi_align3d(
    features: Tensor,
    boxes: Tensor,
    batch_index: Tensor,
    output_size: int | Sequence[int],
    spatial_scale: float | Sequence[float] = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """Pool every box to a fixed grid of bins; each bin is the mean of trilinear samples on a regular grid inside it.

    Boxes are never rounded. A sample outside [-1, size] on any axis counts as 0, any other is clamped to the voxel
    centres of the border. A box without extent on an axis gives 0 with adaptive sampling. Coordinates are computed in
    float64 if boxes or features are float64, else in float32; half features accumulate in float32.

    Differentiable with respect to `features`, once; boxes get no gradient. Autocast changes nothing: the result has
    the dtype of `features`.

    Args:
        features: [N, C, D, H, W], float64, float32, bfloat16 or float16, D, H, W >= 1.
        boxes: [K, 6], float32 or float64, (z1, y1, x1, z2, y2, x2) in voxels of the network's input, half-open.
        batch_index: [K], int64, the image of each box, in [0, N).
        output_size: bins d, h, w, or one int for all three.
        spatial_scale: voxels of `features` per voxel of the input, (z, y, x) or one for all three, e.g. 1/4.
        sampling_ratio: samples per bin and axis; 0 takes ceil(extent of the box / bins) on each axis.
        aligned: shift by half a voxel, so that voxel i spans [i, i + 1) and a box on the voxel grid pools its voxels
            exactly. False is the first RoIAlign: no shift, boxes at least one voxel wide.

    Returns:
        [K, C, d, h, w] in the dtype of `features`; in their memory format, if their channels lie side by side.

    Raises:
        TypeError: an argument has the wrong type or dtype (half boxes included: they cannot hold coordinates).
        ValueError: shapes do not fit, devices differ, a box is not finite, or `batch_index` is outside [0, N). On CUDA
            values are not looked at: such a box pools NaN and passes no gradient.
    """
    check_tensor("features", features, "N, C, D, H, W", FLOATING)
    check_boxes("boxes", boxes, FLOATING[:2])
    check_tensor("batch_index", batch_index, "K", (torch.int64,))
    check_length("batch_index", batch_index, boxes)
    check_device("boxes", boxes, "features", features)
    check_device("batch_index", batch_index, "features", features)
    if 0 in features.shape[2:]:
        raise ValueError(f"features must have D, H, W >= 1, got {tuple(features.shape)}")
    out = three_sizes("output_size", output_size)
    scale = three_scales("spatial_scale", spatial_scale)
    if not isinstance(sampling_ratio, int) or isinstance(sampling_ratio, bool):
        raise TypeError(f"sampling_ratio must be an int, got {sampling_ratio!r}")
    if sampling_ratio < 0:
        raise ValueError(f"sampling_ratio must be >= 0, got {sampling_ratio}; 0 adapts it to each box")
    check_values_finite("boxes", boxes)
    if values_are_readable(batch_index):
        outside = (batch_index < 0) | (batch_index >= features.shape[0])
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            raise ValueError(
                f"batch_index[{row}] = {int(batch_index[row])} is outside the batch of {features.shape[0]} images"
            )
    return torch.ops.seg3d.roi_align3d(
        features, boxes.detach(), batch_index, *out, *scale, sampling_ratio, bool(aligned)
    )
