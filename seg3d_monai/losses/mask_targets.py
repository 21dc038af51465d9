"""Mask targets of RoIs, looked up in the label volume: no dense mask of any instance is ever built."""

from collections.abc import Sequence

import torch
from torch import Tensor

_IGNORED_CODE = 2**31 - 1


@torch.no_grad()
def mask_targets(label: Tensor, ids: Tensor, boxes: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Occupancy of one instance at the bin centres of a grid over each box, interpolated trilinearly.

    Args:
        label: int64 [D, H, W], 0 background, -1 ignore, ids below 2**32 - 1; fewer than 2**31 voxels.
        ids: int64 [P], the instance of each box.
        boxes: float [P, 6], voxels.
        size: (d, h, w) bins.

    Returns:
        occupancy float32 [P, d, h, w] in [0, 1], and valid bool [P, d, h, w]: False where an ignored voxel takes part.
    """
    (z, dz), (y, dy), (x, dx) = (_axis_samples(boxes, axis, size[axis], label.shape[axis]) for axis in range(3))
    rows = z[:, None, :, :, None] * label.shape[1] + y[:, :, None]
    voxels = rows[:, :, None, ..., None] * label.shape[2] + x[:, :, None, None]
    found = _codes(label).flatten().index_select(0, voxels.flatten()).view(voxels.shape)
    valid = found.amax((0, 1, 2)) != _IGNORED_CODE
    occupancy = found.eq_(_codes(ids)[:, None, None, None]).float()  # in place: a bool takes several times as long
    for weight in (dz[:, :, None, None], dy[:, None, :, None], dx[:, None, None, :]):
        occupancy = torch.lerp(occupancy[0], occupancy[1], weight)
    return occupancy, valid


def _codes(label: Tensor) -> Tensor:
    """int64 -1 .. 2**32 - 2 -> int32, which is looked up and compared in half the time; -1 wraps to the largest."""
    return (label.long() - 2**31).int()


def _axis_samples(boxes: Tensor, axis: int, bins: int, size: int) -> tuple[Tensor, Tensor]:
    """The two voxels int32 [2, P, bins] on either side of bin centres on one axis, and weight [P, bins] of the second.

    A centre on a voxel has that one twice, so that only voxels with a share are looked up.
    """
    start, end = boxes[:, axis, None].float(), boxes[:, axis + 3, None].float()
    step = (torch.arange(bins, device=boxes.device) + 0.5) / bins
    position = (start + (end - start) * step - 0.5).clamp(0, size - 1)
    lower = position.floor()
    return torch.stack([lower, position.ceil()]).int(), position - lower
