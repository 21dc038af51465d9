"""Sums over the voxels of objects, block by block: coordinates and their products, pairs of neighbours, intensities.

Everything that is counted (voxels, coordinates, neighbours, intensities of at most 16 bits) is summed in integers, so
the sums do not depend on the blocks. Other intensities are summed in float64, block after block in raster order, and
their variances joined by the formula of Chan, Golub and LeVeque (The American Statistician 37, 1983); there another
block size may change the last digits. This file must not know what is made of the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from seg3d_monai.data.intensity import check_block
from seg3d_monai.data.volume import Volume
from seg3d_monai.inference.blocks import Roi
from seg3d_monai.inference.regions import find_runs

_STEPS = [step for step in product((-1, 0, 1), repeat=3) if step > (0, 0, 0)]
# Steps that are mirror images have the same length and weight, so they are counted together.
STEP_KINDS = sorted({(abs(z), abs(y), abs(x)) for z, y, x in _STEPS})
AXIS_PAIRS = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class ObjectSums:
    """Sums over the voxels of N objects, in a block or in all of them so far.

    Attributes:
        ids: [N], ascending.
        voxels: [N].
        first: [N, 3], sums of the coordinates z, y, x, in voxels of the volume.
        second: [N, 6], sums of the products in `AXIS_PAIRS`, modulo 2**64.
        neighbours: [N, 7], pairs of voxels of the same object, one of `STEP_KINDS` apart.
        total: [N, C], sums of intensity; int64 where they are exact, else float64.
        squares: [N, C], sums of squared intensity (int64), or of squared deviations from the mean (float64).
        lowest: [N, C].
        highest: [N, C].
    """

    ids: Integers
    voxels: Integers
    first: Integers
    second: Integers
    neighbours: Integers
    total: NDArray
    squares: NDArray
    lowest: NDArray
    highest: NDArray

    @classmethod
    def empty(cls, num_channels: int, dtype: np.dtype) -> ObjectSums:
        """The sums of no object, of an image of so many channels of a dtype."""
        first, second, neighbours = (np.zeros((0, n), np.int64) for n in (3, len(AXIS_PAIRS), len(STEP_KINDS)))
        total = np.zeros((0, num_channels), _sum_dtype(dtype))
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64), first, second, neighbours, total, total, total, total)


def _sum_dtype(dtype: np.dtype) -> type[np.int64] | type[np.float64]:
    # The squares of 16 bits leave room for 2**31 voxels an object.
    return np.int64 if dtype.kind in "bui" and dtype.itemsize <= 2 else np.float64


def sum_block(codes: NDArray[np.int32], ids: Integers, roi: Roi, image: Volume) -> ObjectSums:
    """Sums over the objects of a block; `codes` reaches one voxel beyond its upper faces."""
    neighbours = _count_neighbours(codes, len(ids))
    owned = codes[:-1, :-1, :-1]
    starts, lengths = find_runs(owned)
    run_codes = owned.reshape(-1)[starts]
    length = lengths.astype(np.int64)
    z, y, x = (place + low for place, low in zip(np.unravel_index(starts, owned.shape), roi[:3], strict=True))
    along = length * x + length * (length - 1) // 2
    along_squared = x * (2 * along - length * x) + (length - 1) * length * (2 * length - 1) // 6
    first = (length * z, length * y, along)
    second = (first[0] * z, first[1] * y, along_squared, first[0] * y, along * z, along * y)

    def summed(values: NDArray) -> NDArray:
        result = np.zeros(len(ids) + 1, values.dtype)
        np.add.at(result, run_codes, values)
        return result

    def columns(values: Sequence[NDArray]) -> NDArray:
        return np.stack(values, axis=1)[1:]  # without the background

    voxels = summed(length)
    block = image.read(roi)
    check_block(block, roi, image.path)
    total, squares, lowest, highest = [], [], [], []
    for channel in block:
        values = channel.reshape(-1).astype(_sum_dtype(channel.dtype))
        sums = summed(np.add.reduceat(values, starts))
        is_float = values.dtype.kind == "f"
        # The start must be neutral: an object may have no voxel here but in the margin.
        limits = (-np.inf, np.inf) if is_float else (np.iinfo(np.int64).min, np.iinfo(np.int64).max)
        high, low = (np.full_like(sums, limit) for limit in limits)
        np.minimum.at(low, run_codes, np.minimum.reduceat(values, starts))
        np.maximum.at(high, run_codes, np.maximum.reduceat(values, starts))
        if is_float:
            means = np.divide(sums, voxels, out=np.zeros_like(sums), where=voxels > 0)
            values -= np.repeat(means[run_codes], lengths)
        total.append(sums)
        squares.append(summed(np.add.reduceat(values * values, starts)))
        lowest.append(low)
        highest.append(high)
    return ObjectSums(
        ids=ids,
        voxels=voxels[1:],
        first=columns([summed(values) for values in first]),
        second=columns([summed(values) for values in second]),
        neighbours=neighbours,
        total=columns(total),
        squares=columns(squares),
        lowest=columns(lowest),
        highest=columns(highest),
    )


def _count_neighbours(codes: NDArray[np.int32], num_objects: int) -> Integers:
    """[num_objects, 7]: pairs of voxels of one object, by `STEP_KINDS`.

    A pair belongs to the block that owns the lowest corner of the pair's bounding box, so the blocks of a volume count
    every pair once.
    """
    counts = np.zeros((num_objects, len(STEP_KINDS)), np.int64)
    for step in _STEPS:
        near = codes[tuple(slice(1, None) if s < 0 else slice(-1) for s in step)]
        far = codes[tuple(slice(1, None) if s > 0 else slice(-1) for s in step)]
        same = near[(near == far) & (near > 0)]
        kind = STEP_KINDS.index((abs(step[0]), abs(step[1]), abs(step[2])))
        counts[:, kind] += np.bincount(same, minlength=num_objects + 1)[1:]
    return counts


def join_sums(parts: Sequence[ObjectSums]) -> ObjectSums:
    """Join sums over disjoint sets of voxels."""
    ids = np.concatenate([part.ids for part in parts])
    if len(ids) == 0:
        return parts[0]
    order = np.argsort(ids, kind="stable")
    unique, starts, group = np.unique(ids[order], return_index=True, return_inverse=True)

    def rows(name: str) -> NDArray:
        return np.concatenate([getattr(part, name) for part in parts])[order]

    def added(values: NDArray) -> NDArray:
        return np.add.reduceat(values, starts, axis=0)

    voxels, total, squares = rows("voxels"), rows("total"), rows("squares")
    if total.dtype.kind == "f":
        part_means = total / np.maximum(voxels, 1)[:, None]
        means = added(total) / np.maximum(added(voxels), 1)[:, None]
        squares = squares + voxels[:, None] * (part_means - means[group]) ** 2
    return ObjectSums(
        ids=unique,
        voxels=added(voxels),
        first=added(rows("first")),
        second=added(rows("second")),
        neighbours=added(rows("neighbours")),
        total=added(total),
        squares=added(squares),
        lowest=np.minimum.reduceat(rows("lowest"), starts, axis=0),
        highest=np.maximum.reduceat(rows("highest"), starts, axis=0),
    )
