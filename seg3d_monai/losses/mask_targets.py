"""Mask targets of RoIs, looked up in the label volume: no dense mask of any instance is ever built."""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor


@torch.no_grad()
def mask_targets(label: Tensor, ids: Tensor, boxes: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Occupancy of one instance at the bin centres of a grid over each box, interpolated trilinearly.

    Args:
        label: int64 [D, H, W], 0 background, -1 ignore.
        ids: int64 [P], the instance of each box.
        boxes: float [P, 6], voxels.
        size: (d, h, w) bins.

    Returns:
        occupancy float32 [P, d, h, w] in [0, 1], and valid bool [P, d, h, w]: False where an ignored voxel takes part.
    """
    lower, weight = zip(*(_axis_samples(boxes, axis, size[axis], label.shape[axis]) for axis in range(3)), strict=True)
    occupancy = boxes.new_zeros((len(boxes), *size), dtype=torch.float32)
    valid = torch.ones_like(occupancy, dtype=torch.bool)
    for corner in product((0, 1), repeat=3):
        z, y, x = (
            (lower[axis] + corner[axis]).clamp(max=label.shape[axis] - 1).view(_along(axis, len(boxes), size[axis]))
            for axis in range(3)
        )
        share = [weight[axis] if corner[axis] else 1 - weight[axis] for axis in range(3)]
        dz, dy, dx = (share[axis].view(_along(axis, len(boxes), size[axis])) for axis in range(3))
        factor = dz * dy * dx
        found = label[z, y, x]
        occupancy += factor * (found == ids[:, None, None, None])
        valid &= (found != -1) | (factor == 0)
    return occupancy, valid


def _axis_samples(boxes: Tensor, axis: int, bins: int, size: int) -> tuple[Tensor, Tensor]:
    """Lower voxel [P, bins] and weight of the next one [P, bins], for the bin centres of boxes on one axis."""
    start, end = boxes[:, axis, None].float(), boxes[:, axis + 3, None].float()
    step = (torch.arange(bins, device=boxes.device) + 0.5) / bins
    position = (start + (end - start) * step - 0.5).clamp(0, size - 1)
    lower = position.floor()
    return lower.long(), position - lower


def _along(axis: int, rows: int, bins: int) -> list[int]:
    shape = [rows, 1, 1, 1]
    shape[axis + 1] = bins
    return shape
