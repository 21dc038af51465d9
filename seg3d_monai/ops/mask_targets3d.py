"""Mask targets of boxes, looked up in a label volume: the Python function."""

from collections.abc import Sequence

import torch
from torch import Tensor

from seg3d_monai.ops.arguments import check_boxes, check_device, check_length, check_tensor, three_sizes


def mask_targets3d(label: Tensor, ids: Tensor, boxes: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Occupancy of one instance at the bin centres of a grid over each box, interpolated trilinearly.

    No dense mask of any instance is built. Beyond the volume its border goes on. Not differentiable.

    Args:
        label: int64 [D, H, W], 0 background, -1 ignore, ids below 2**32 - 1; 1 to 2**31 - 1 voxels.
        ids: int64 [P], the instance of each box.
        boxes: float32 [P, 6], voxels, finite.
        size: (d, h, w) bins.

    Returns:
        occupancy float32 [P, d, h, w] in [0, 1], and valid bool [P, d, h, w]: False where an ignored voxel takes part.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not fit, the volume is empty, or devices differ.
    """
    check_tensor("label", label, "D, H, W", (torch.int64,))
    if label.numel() == 0:
        raise ValueError(f"label is empty, {tuple(label.shape)}; give at least one voxel")
    check_boxes("boxes", boxes, (torch.float32,))
    check_tensor("ids", ids, "P", (torch.int64,))
    check_length("ids", ids, boxes)
    for name, tensor in (("ids", ids), ("boxes", boxes)):
        check_device(name, tensor, "label", label)
    found: tuple[Tensor, Tensor] = torch.ops.seg3d.mask_targets3d(
        label, ids, boxes.detach(), *three_sizes("size", size)
    )
    return found
