"""From mask logits on a detection's grid to a voxel mask over its box. Must not know models."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Grid = NDArray[np.floating[Any]]


def paste_mask(logits: Tensor, box: Tensor, threshold: float = 0.5) -> Tensor:
    """Voxels of one detection: logits interpolated at voxel centres, then thresholded.

    Args:
        logits: float [d, h, w]; the grid spans the box, bin centres at (i + 0.5) / d of its extent.
        box: float [6], voxels, half-open.
        threshold: probability at which a voxel belongs to the object, in (0, 1).

    Returns:
        bool, on the CPU, over floor(lower corner) .. ceil(upper corner); voxels whose centre lies outside the box are
        False.
    """
    corners = box.tolist()
    lower, upper = [math.floor(v) for v in corners[:3]], [math.ceil(v) for v in corners[3:]]
    inside = [math.ceil(v - 0.5) for v in corners]  # the voxels whose centres the half-open box holds
    value = resample_logits(logits_array(logits), corners, inside, [inside[a + 3] - inside[a] for a in range(3)])
    mask = np.zeros([b - a for a, b in zip(lower, upper, strict=True)], dtype=bool)
    window = tuple(slice(inside[a] - lower[a], inside[a + 3] - lower[a]) for a in range(3))
    np.greater(value, math.log(threshold / (1 - threshold)), out=mask[window])
    return torch.from_numpy(mask)


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
