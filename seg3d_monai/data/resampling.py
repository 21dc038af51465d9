"""Voxels of another size: a region of the volume that would come out if all of it were resampled.

That volume's voxels are counted from the corner of the one on disk, and their values are summed in an order of their
own, so a region has the same bits whatever part of the disk's volume it is made from. Coarser voxels are the mean of
what they cover, which keeps out what they cannot show (aliasing) and averages noise as a coarser camera would; finer
ones are interpolated linearly. Training crops and the blocks of a prediction share this arithmetic: a network sees
the same picture in both. Labels are ids, of which there is no mean: each voxel takes the id at its centre.

This file knows arrays and where they lie, neither files nor networks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seg3d_monai.data.volume import Roi

MOST_RATIO = 50.0
"""Voxel sizes that differ by more are taken for a mistake in the unit."""

_SLACK = 1e-9  # of a voxel: rounding must not add a plane to the grid
_TIE = 1e-6  # of a voxel: a centre on a face belongs to the upper side, as half-open boxes have it

Step = tuple[float, float, float]
"""(z, y, x) voxels of a volume per resampled voxel; exactly 1 along an axis that is left alone."""
UNCHANGED: Step = (1.0, 1.0, 1.0)


def step_between(wanted_um: Sequence[float], spacing_um: Sequence[float], tolerance: float) -> Step:
    """The step from a volume to voxels of a wanted size.

    Args:
        wanted_um: (z, y, x) micrometres per resampled voxel.
        spacing_um: (z, y, x) micrometres per voxel of the volume.
        tolerance: share by which an axis may differ and is left alone, 0 or more.
    """
    ratios = (wanted / stored for wanted, stored in zip(wanted_um, spacing_um, strict=True))
    z, y, x = (1.0 if abs(ratio - 1) <= tolerance else ratio for ratio in ratios)
    return z, y, x


def resampled_roi(roi: Sequence[int], step: Step) -> Roi:
    """The smallest ROI of the resampled volume that covers a ROI of the volume.

    Args:
        roi: (z1, y1, x1, z2, y2, x2), voxels of the volume.
        step: (z, y, x) voxels of the volume per resampled voxel.
    """
    z1, y1, x1 = (math.floor(v / s + _SLACK) for v, s in zip(roi[:3], step, strict=True))
    z2, y2, x2 = (math.ceil(v / s - _SLACK) for v, s in zip(roi[3:], step, strict=True))
    return z1, y1, x1, z2, y2, x2


def covered_roi(region: Sequence[int], step: Step, shape: Sequence[int]) -> Roi:
    """The smallest ROI of the volume that covers a ROI of the resampled one.

    Args:
        region: (z1, y1, x1, z2, y2, x2), resampled voxels.
        step: (z, y, x) voxels of the volume per resampled voxel.
        shape: (z, y, x) of the volume.
    """
    z1, y1, x1 = (math.floor(v * s + _SLACK) for v, s in zip(region[:3], step, strict=True))
    z2, y2, x2 = (min(math.ceil(v * s - _SLACK), n) for v, s, n in zip(region[3:], step, shape, strict=True))
    return z1, y1, x1, z2, y2, x2


def source_roi(region: Sequence[int], step: Step, shape: Sequence[int]) -> Roi:
    """The ROI of the volume whose voxels make up a ROI of the resampled one, neighbours for interpolation included.

    Args:
        region: (z1, y1, x1, z2, y2, x2), resampled voxels, inside the resampled volume.
        step: (z, y, x) voxels of the volume per resampled voxel.
        shape: (z, y, x) of the volume.
    """
    spans = []
    for low, high, s, n in zip(region[:3], region[3:], step, shape, strict=True):
        if s < 1:
            first, last = ((place + 0.5) * s - 0.5 for place in (low, high - 1))
            spans.append((max(0, math.floor(first)), min(n, math.floor(last) + 2)))
        else:
            spans.append((math.floor(low * s), min(n, math.ceil(high * s))))
    (z1, z2), (y1, y2), (x1, x2) = spans
    return z1, y1, x1, z2, y2, x2


def resample_image(block: Tensor, roi: Sequence[int], region: Sequence[int], step: Step) -> Tensor:
    """A region of the resampled volume.

    Args:
        block: floating [C, d, h, w], voxels of the volume over `roi`.
        roi: (z1, y1, x1, z2, y2, x2) of the block in the volume.
        region: (z1, y1, x1, z2, y2, x2) in the resampled volume; what a voxel there needs beyond the block is left out
            of a mean, and continued by the outermost voxel for an interpolation.
        step: (z, y, x) voxels of the volume per resampled voxel.

    Returns:
        [C, *extent of the region] of the block's dtype; the block itself where every step is 1. Voxels whose sources
        the block holds have the same bits whichever block they are made from.
    """
    for axis in sorted(range(3), key=lambda a: -step[a]):  # what shrinks comes first: the others have less to do
        if step[axis] != 1:
            target, bounds = np.arange(region[axis], region[axis + 3]), (roi[axis], roi[axis + 3])
            block = _resample_axis(block, axis + 1, target, bounds, step[axis])
    return block


def resample_labels(labels: NDArray[Any], roi: Sequence[int], region: Sequence[int], step: Step) -> NDArray[Any]:
    """A region of the resampled labels: each voxel takes the id at its centre, or the nearest within the block.

    Args:
        labels: [C, d, h, w], voxels of the volume over `roi`.
        roi: (z1, y1, x1, z2, y2, x2) of the block in the volume.
        region: (z1, y1, x1, z2, y2, x2) in the resampled volume.
        step: (z, y, x) voxels of the volume per resampled voxel.

    Returns:
        [C, *extent of the region]: a new array, whose ids are among those of `labels`.
    """
    places = []
    for axis in range(3):
        centres = (np.arange(region[axis], region[axis + 3]) + 0.5) * step[axis]
        places.append(np.floor(centres + _TIE).astype(np.int64).clip(roi[axis], roi[axis + 3] - 1) - roi[axis])
    z, y, x = np.ix_(*places)
    return labels[:, z, y, x]


def taps(target: NDArray[Any], bounds: tuple[int, int], step: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Which source voxels make up target voxels along an axis, and their shares.

    Args:
        target: [K] places in the grid whose voxels are `step` source voxels long; fractions move the voxel.
        bounds: first and last + 1 of the source voxels that there are; both grids start at the volume's corner.
        step: source voxels per target voxel. Above 1 a voxel is the mean of what it covers, at the bounds of the part
            inside; else it is interpolated linearly, constant past the outermost centres.

    Returns:
        places [K, T], shares [K, T] that sum to 1; a place out of bounds has no share.
    """
    start, stop = bounds
    column = target[:, None]
    if step > 1:
        source = np.floor(column * step).astype(np.int64) + np.arange(math.ceil(step) + 1)
        overlap = np.minimum((column + 1) * step, source + 1) - np.maximum(column * step, source)
        weights = np.where((source >= start) & (source < stop), overlap.clip(0), 0.0)
        return source, weights / weights.sum(1, keepdims=True)
    position = ((column + 0.5) * step - 0.5).clip(start, stop - 1)
    source = np.floor(position).astype(np.int64) + np.arange(2)
    return source, 1 - np.abs(position - source)


def _resample_axis(block: Tensor, dim: int, target: NDArray[np.int64], bounds: tuple[int, int], step: float) -> Tensor:
    source, weights = taps(target, bounds, step)
    index = torch.from_numpy(source.clip(bounds[0], bounds[1] - 1) - bounds[0]).to(block.device)
    weight = torch.from_numpy(weights).to(block.device, block.dtype)
    shape = (-1, *(1,) * (block.ndim - 1 - dim))
    result = block.index_select(dim, index[:, 0]).mul_(weight[:, 0].view(shape))
    for tap in range(1, index.shape[1]):
        # Products are rounded before they are added, tap by tap: a matrix product or a fused addcmul sums in an
        # order, or with a rounding, that depends on the place in the block.
        if weights[:, tap].any():
            result += block.index_select(dim, index[:, tap]).mul_(weight[:, tap].view(shape))
    return result
