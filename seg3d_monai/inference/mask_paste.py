"""From mask logits on a detection's grid to a voxel mask over its box, or to another grid. Must not know models."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seg3d_monai.inference.blocks import Roi
from seg3d_monai.ops import paste_masks3d

Grid = NDArray[np.floating[Any]]
PlacedMask = tuple[Roi, NDArray[np.bool_]]
"""The voxels that a mask spans, and the mask over them."""


def placed_masks(logits: Tensor | Sequence[Tensor], boxes: Tensor, threshold: float) -> list[PlacedMask]:
    """The voxels that each box touches, and the mask over them; see `seg3d_monai.ops.paste_masks3d`.

    Args:
        logits: float [N, d, h, w] over the boxes, or N grids.
        boxes: float [N, 6], voxels.
        threshold: probability at which a voxel belongs to the mask.

    Raises:
        ValueError: if a box is not finite.
    """
    if not bool(torch.isfinite(boxes).all()):
        corners = boxes[~torch.isfinite(boxes).all(1)][0].tolist()
        raise ValueError(f"the network returned the box {corners}; check its weights, or turn amp off")
    rois, masks = paste_masks3d(logits, boxes, threshold)
    return [(cast(Roi, tuple(roi)), mask.numpy()) for roi, mask in zip(rois.tolist(), masks, strict=True)]


def logits_array(logits: Tensor) -> Grid:
    """Logits as an array in float32, or float64 where they are."""
    return (logits if logits.dtype == torch.float64 else logits.float()).detach().cpu().numpy()


def resample_logits(logits: Grid, box: Sequence[float], target: Sequence[float], shape: Sequence[int]) -> Grid:
    """A grid of logits over one box, interpolated at the bin centres of a grid over another box.

    Trilinear interpolation is separable: one small matrix product for each axis does what `grid_sample` does with
    eight reads for each voxel. In numpy, as threads cost such small products more than they save. Beyond the outermost
    bin centres the outermost value holds (`grid_sample`'s "border" padding).

    Args:
        logits: [d, h, w] over `box`.
        box: (z1, y1, x1, z2, y2, x2), voxels.
        target: another box in the same frame.
        shape: (d, h, w) of the grid over `target`.

    Returns:
        Logits of that shape; `logits` itself where box and shape are the same.
    """
    if list(box) == list(target) and logits.shape == tuple(shape):
        return logits
    value = logits
    for axis, (size, wanted) in enumerate(zip(logits.shape, shape, strict=True)):
        extent = max(box[axis + 3] - box[axis], 1e-6)
        step = (target[axis + 3] - target[axis]) / max(wanted, 1)
        centre = (np.arange(wanted) + 0.5) * step + (target[axis] - box[axis])
        position = np.minimum(np.maximum(centre * (size / extent) - 0.5, 0), size - 1)
        weight = np.maximum(1 - np.abs(np.arange(size)[:, None] - position), 0).astype(logits.dtype)
        # The first axis is contracted and comes back as the last: after three rounds they stand as before.
        value = (value.reshape(size, -1).T @ weight).reshape(*value.shape[1:], wanted)
    return value
