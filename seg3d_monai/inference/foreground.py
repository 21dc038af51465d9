"""Which blocks need no prediction: those outside a mask, and those that hold nothing but background.

A block is left out only after every one of its voxels was read. What is cheap comes first: a coarse level of an
OME-Zarr shows at once where something is, elsewhere the block is read piece by piece, chunks as they are stored, from
its middle, until one piece settles it. This file knows no predictor.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import product
from math import prod

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from seg3d_monai.data.volume import ArrayVolume, StoredVolume, Volume, open_volume
from seg3d_monai.inference.blocks import BlockPlan, Roi, roi_shape

LOOK_VOXELS = 2**26
"""Most voxels of a coarse level, or of a mask, that are kept in memory."""
PIECE_VOXELS = 2**16
"""Small chunks are read together, up to about so many voxels: one read of each would cost more than its voxels."""

_GOLDEN = (5**0.5 - 1) / 2


def foreground_blocks(
    plan: BlockPlan,
    volume: Volume,
    mask: Volume | NDArray[np.generic] | str | os.PathLike[str] | None = None,
    skip_below: float | Sequence[float] | None = None,
    progress: bool = False,
) -> NDArray[np.bool_]:
    """The blocks of a plan that may hold an object.

    Both conditions look at what a block reads, not only at what it owns, so that an object on a face is seen by the
    blocks on either side of it.

    Args:
        plan: the blocks.
        volume: the stack.
        mask: a volume, array or path; it spans the same box as the stack with voxels of its own size. Blocks whose
            read ROI holds no part of a voxel > 0 (of any channel) are left out. None masks nothing.
        skip_below: a grey value, or one per channel; blocks are left out in which no voxel exceeds it. None leaves out
            only blocks whose voxels are all equal, per channel: stitched stacks are padded with zeros. `-inf` keeps
            all blocks.
        progress: show a progress bar.

    Returns:
        bool [blocks], by block index: whether a block is to be predicted. It depends on voxels and arguments alone; NaN
        is foreground. A coarse level of the stack is believed where it shows foreground, so one that was
        made otherwise than by mean, nearest or largest voxel can keep a block too many, and never loses one.

    Raises:
        FileNotFoundError: there is nothing at the mask's path.
        ValueError: the plan is for another shape, `skip_below` has the wrong length or is NaN, or voxels of the volume
            or mask cannot be read.
        TypeError: `skip_below` is not a number or numbers.
    """
    if tuple(volume.shape[1:]) != plan.shape:
        raise ValueError(f"plan is for a volume of shape {plan.shape}, not {tuple(volume.shape[1:])}; make it anew")
    thresholds = _thresholds(skip_below, volume.shape[0])
    marked = None if mask is None else _open_mask(mask)
    coarse = _coarse_level(volume)
    found = np.zeros(len(plan), dtype=bool)
    for block in tqdm(plan, total=len(plan), desc="find foreground", unit="block", disable=not progress):
        found[block.index] = (marked is None or _is_marked(marked, block.read, plan.shape)) and (
            (coarse is not None and _shows_foreground(coarse, block.read, plan.shape, thresholds))
            or _holds_foreground(volume, block.read, thresholds)
        )
    return found


def _is_marked(mask: Volume, roi: Roi, shape: Sequence[int]) -> bool:
    """Whether a voxel > 0 of the mask lies in a ROI of the volume, at least in part."""
    lower = [v * m // n for v, m, n in zip(roi[:3], mask.shape[1:], shape, strict=True)]
    upper = [-(-v * m // n) for v, m, n in zip(roi[3:], mask.shape[1:], shape, strict=True)]
    return not (mask.read((*lower, *upper)) <= 0).all()


def _shows_foreground(coarse: Volume, roi: Roi, shape: Sequence[int], thresholds: NDArray[np.float64] | None) -> bool:
    """Whether voxels of a coarse level that lie wholly in a ROI of the volume are foreground."""
    lower, upper = [], []
    for start, stop, m, n in zip(roi[:3], roi[3:], coarse.shape[1:], shape, strict=True):
        # Writers round the last coarse voxel up or down, which shifts the others by less than one of them.
        margin = int(m != n)
        lower.append(-(-start * m // n) + margin if start > 0 else 0)
        upper.append(stop * m // n - margin if stop < n else m)
    if any(a >= b for a, b in zip(lower, upper, strict=True)):
        return False
    voxels = coarse.read((*lower, *upper))
    return not _is_background(voxels, voxels[:, :1, :1, :1], thresholds)


def _holds_foreground(volume: Volume, roi: Roi, thresholds: NDArray[np.float64] | None) -> bool:
    """Whether a ROI holds foreground, reading no more than it takes to know."""
    value: NDArray[np.generic] | None = None
    for piece in _pieces(roi, volume.chunk_shape):
        try:
            voxels = volume.read(piece)
        except ValueError:  # damaged: prediction will say so, with the block's coordinates
            return True
        value = voxels[:, :1, :1, :1].copy() if value is None else value
        if not _is_background(voxels, value, thresholds):
            return True
    return False


def _is_background(
    voxels: NDArray[np.generic], value: NDArray[np.generic], thresholds: NDArray[np.float64] | None
) -> bool:
    """Whether no voxel exceeds its channel's threshold, or, without one, differs from `value` [C, 1, 1, 1]."""
    if thresholds is None:
        return bool((voxels == value).all())
    return bool((voxels.max(axis=(1, 2, 3)) <= thresholds).all())  # NaN is the maximum and below nothing


def _pieces(roi: Roi, chunk_shape: Sequence[int]) -> list[Roi]:
    """A ROI cut at the borders of chunks; its middle first, then far from what came before."""
    extent, step = roi_shape(roi), list(chunk_shape)
    for axis in (2, 1, 0):
        size = prod(min(s, e) for s, e in zip(step, extent, strict=True))
        step[axis] *= max(1, min(PIECE_VOXELS // size, -(-extent[axis] // step[axis])))
    axes = [
        [(max(a, low), min(a + s, high)) for a in range(low // s * s, high, s)]
        for low, high, s in zip(roi[:3], roi[3:], step, strict=True)
    ]
    pieces: list[Roi] = [(z1, y1, x1, z2, y2, x2) for (z1, z2), (y1, y2), (x1, x2) in product(*axes)]
    middle = len(pieces) // 2
    order = sorted(range(len(pieces)), key=lambda i: (i - middle) * _GOLDEN % 1)
    return [pieces[i] for i in order]


def _thresholds(skip_below: float | Sequence[float] | None, num_channels: int) -> NDArray[np.float64] | None:
    if skip_below is None:
        return None
    try:
        values = np.asarray(skip_below, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"skip_below is {skip_below!r}; pass a grey value, or one per channel") from None
    if values.shape not in ((), (1,), (num_channels,)) or np.isnan(values).any():
        raise ValueError(f"skip_below is {skip_below!r}; pass a grey value, or one for each of {num_channels} channels")
    return np.broadcast_to(values, num_channels)


def _open_mask(mask: Volume | NDArray[np.generic] | str | os.PathLike[str]) -> Volume:
    if isinstance(mask, np.ndarray):
        return ArrayVolume(mask)
    volume = open_volume(mask) if isinstance(mask, (str, os.PathLike)) else mask
    return _in_memory(volume) if prod(volume.shape) <= LOOK_VOXELS else volume


def _coarse_level(volume: Volume) -> Volume | None:
    """The finest level below the volume's own that fits into memory, or None."""
    while isinstance(volume, StoredVolume):
        try:
            volume = volume.at_level(volume.level + 1)
        except ValueError:  # the coarsest was the last one, or the file knows no levels
            return None
        if prod(volume.shape) <= LOOK_VOXELS:
            return _in_memory(volume)
    return None


def _in_memory(volume: Volume) -> Volume:
    return ArrayVolume(volume.read((0, 0, 0, *volume.shape[1:])))
