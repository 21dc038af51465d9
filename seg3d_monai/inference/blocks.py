"""The plan of blocks: what a block owns, what it reads, and which blocks see the same voxels.

Owned ROIs tile the volume, or the region of it that is asked for; a read ROI is the owned ROI plus the halo on every
side, clipped to the volume. A block's index is its place in raster order of the grid, so it depends on the plan alone.
The time points of a series have a grid each, one after the other, and never see each other. This file knows geometry
only: no arrays, no files, no predictor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

Roi = tuple[int, int, int, int, int, int]
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Block:
    """One block of the plan.

    Attributes:
        index: place in raster order of the grid, from 0; later time points follow.
        time: place of its time point in the series, from 0.
        position: (i, j, k) in the grid.
        owned: the ROI that this block alone writes, volume voxels, half-open.
        read: the ROI that this block sees, owned + halo clipped to the volume.
    """

    index: int
    time: int
    position: Triple
    owned: Roi
    read: Roi


@dataclass(frozen=True)
class BlockPlan:
    """A grid of blocks over a volume, the same for each time point.

    Attributes:
        shape: (Z, Y, X) of the volume.
        block_size: (z, y, x) of an owned ROI; clipped where the region ends.
        halo: (z, y, x) voxels read beyond the owned ROI on either side.
        region: the ROI that the blocks tile.
        offset: (z, y, x) of a grid line, volume voxels; the others are multiples of the block size away.
        first: (z, y, x) number of the first block, counted from the offset: below 0 where it begins before it.
        grid: number of blocks per axis.
        times: number of time points.
    """

    shape: Triple
    block_size: Triple
    halo: Triple
    region: Roi
    offset: Triple
    first: Triple
    grid: Triple
    times: int

    @classmethod
    def make(
        cls,
        *,
        shape: Sequence[int],
        block_size: int | Sequence[int],
        halo: int | Sequence[int],
        roi: Sequence[int] | None = None,
        offset: int | Sequence[int] = 0,
        times: int = 1,
        step: Sequence[float] = (1, 1, 1),
    ) -> BlockPlan:
        """A checked plan.

        Args:
            shape: (Z, Y, X) of the volume, each at least 1.
            block_size: int or (z, y, x), voxels, each at least 1; larger than the volume means one block on that axis.
            halo: int or (z, y, x), voxels, each at least 0, at least 1 on an axis that holds more than one block.
            roi: (z1, y1, x1, z2, y2, x2) to predict, volume voxels; None for all. Grid lines stay where they are
                without it, so blocks inside are those of the whole volume.
            offset: int or (z, y, x), voxels, by which the grid lines are moved, each at least 0.
            times: number of time points, at least 1.
            step: (z, y, x) voxels of the volume per voxel of `block_size` and `halo`, more than 0: a model that works
                in voxels of its own size sees blocks of the extents that were asked for, or nearly so, and not less
                halo.

        Raises:
            ValueError: if a number is out of its range or has not 3 values, or the ROI is empty or leaves the volume.
            TypeError: if a number is not an integer.
        """
        extent = _triple("shape", shape, minimum=1)
        size = _triple("block_size", block_size, minimum=1)
        margin = _triple("halo", halo, minimum=0)
        size = _as_triple(_scaled_size(n, s) for n, s in zip(size, step, strict=True))
        margin = _as_triple(_scaled_halo(n, s) for n, s in zip(margin, step, strict=True))
        start = _triple("offset", offset, minimum=0)
        if isinstance(times, bool) or not isinstance(times, int) or times < 1:
            raise ValueError(f"times is {times!r}; pass an integer of at least 1")
        region = (0, 0, 0, *extent) if roi is None else _region(roi, extent)
        size = _as_triple(min(s, e) for s, e in zip(size, extent, strict=True))
        first = _as_triple((lo - o) // s for lo, o, s in zip(region[:3], start, size, strict=True))
        stop = _as_triple(-((o - hi) // s) for hi, o, s in zip(region[3:], start, size, strict=True))
        grid = _as_triple(b - a for a, b in zip(first, stop, strict=True))
        for axis, count, h in zip("zyx", grid, margin, strict=True):
            if count > 1 and h < 1:
                raise ValueError(
                    f"halo is 0 along {axis}, where the volume has {count} blocks: no voxel is seen by two blocks, so "
                    f"objects on a face cannot be stitched; pass a halo of at least 1 (about an object's radius), or a "
                    f"block_size of {extent['zyx'.index(axis)]} along {axis}"
                )
        return cls(
            shape=extent,
            block_size=size,
            halo=margin,
            region=region,
            offset=start,
            first=first,
            grid=grid,
            times=times,
        )

    @property
    def blocks_per_time(self) -> int:
        """Blocks of one time point."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    def __len__(self) -> int:
        return self.times * self.blocks_per_time

    def __iter__(self) -> Iterator[Block]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Block:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        time, place = divmod(index, self.blocks_per_time)
        _, rows, columns = self.grid
        position = (place // (rows * columns), place // columns % rows, place % columns)
        low, high, read_low, read_high = [], [], [], []
        for axis in range(3):
            line = self.offset[axis] + (self.first[axis] + position[axis]) * self.block_size[axis]
            low.append(max(line, self.region[axis]))
            high.append(min(line + self.block_size[axis], self.region[axis + 3]))
            read_low.append(max(low[axis] - self.halo[axis], 0))
            read_high.append(min(high[axis] + self.halo[axis], self.shape[axis]))
        return Block(index, time, position, _as_roi(low + high), _as_roi(read_low + read_high))

    def neighbours(self, index: int) -> list[int]:
        """Blocks whose read ROI overlaps the read ROI of this one, ascending, without itself.

        A halo of more than half a block reaches beyond the 26 adjacent blocks.
        """
        block = self[index]
        found = self._blocks_near(block.time, *self._reach(block.position))
        return [other for other in found if other != index and intersection(block.read, self[other].read) is not None]

    def owners(self, block: Block) -> list[int]:
        """Blocks whose owned ROI overlaps the read ROI of a block, ascending, with itself."""
        found = self._blocks_near(block.time, *self._reach(block.position))
        return [other for other in found if intersection(block.read, self[other].owned) is not None]

    def _reach(self, position: Triple) -> tuple[list[int], list[int]]:
        """First and last position of the blocks that can share a read voxel with one."""
        # The d - 1 blocks between two are whole, so their read ROIs overlap iff (d - 1) * size < 2 * halo.
        reach = [-(-2 * h // s) for h, s in zip(self.halo, self.block_size, strict=True)]
        low = [max(p - r, 0) for p, r in zip(position, reach, strict=True)]
        high = [min(p + r, g - 1) for p, r, g in zip(position, reach, self.grid, strict=True)]
        return low, high

    def _blocks_near(self, time: int, low: Sequence[int], high: Sequence[int]) -> Iterator[int]:
        axes = [range(a, b + 1) for a, b in zip(low, high, strict=True)]
        start = time * self.blocks_per_time
        return (start + (i * self.grid[1] + j) * self.grid[2] + k for i, j, k in product(*axes))


def intersection(a: Roi, b: Roi) -> Roi | None:
    """The ROI that two ROIs share, or None."""
    z1, y1, x1 = max(a[0], b[0]), max(a[1], b[1]), max(a[2], b[2])
    z2, y2, x2 = min(a[3], b[3]), min(a[4], b[4]), min(a[5], b[5])
    return (z1, y1, x1, z2, y2, x2) if z1 < z2 and y1 < y2 and x1 < x2 else None


def roi_shape(roi: Roi) -> Triple:
    """Extent (d, h, w) of a ROI."""
    return roi[3] - roi[0], roi[4] - roi[1], roi[5] - roi[2]


def roi_slices(roi: Roi, origin: Sequence[int] = (0, 0, 0)) -> tuple[slice, slice, slice]:
    """Slices of a ROI in an array whose first voxel lies at `origin`."""
    return (
        slice(roi[0] - origin[0], roi[3] - origin[0]),
        slice(roi[1] - origin[1], roi[4] - origin[1]),
        slice(roi[2] - origin[2], roi[5] - origin[2]),
    )


def _scaled_size(size: int, step: float) -> int:
    """A block's extent in voxels of the volume; divided by a power of 2, as chunks are to divide blocks."""
    if step == 1:
        return size
    exact = size * step
    unit = 1 << max(int(exact).bit_length() - 3, 0)  # an eighth of it to a quarter: no great change
    return max(round(exact / unit), 1) * unit


def _scaled_halo(halo: int, step: float) -> int:
    # The outermost voxel of the model is made of what the block sees of it only.
    return halo if step == 1 or halo == 0 else math.ceil(halo * step) + math.ceil(step)


def _as_triple(values: Iterable[int]) -> Triple:
    a, b, c = values
    return a, b, c


def _as_roi(values: Iterable[int]) -> Roi:
    z1, y1, x1, z2, y2, x2 = values
    return z1, y1, x1, z2, y2, x2


def _region(roi: Sequence[int], extent: Triple) -> Roi:
    values = list(roi)
    if len(values) != 6:
        raise ValueError(f"roi has {len(values)} values: {values}; pass six integers (z1, y1, x1, z2, y2, x2)")
    low, high = _triple("roi", values[:3], minimum=0), _triple("roi", values[3:], minimum=0)
    if any(not a < b <= n for a, b, n in zip(low, high, extent, strict=True)):
        raise ValueError(f"roi is {values}; it must hold a voxel and lie inside the volume of (z, y, x) = {extent}")
    return (*low, *high)


def check_sizes(block_size: int | Sequence[int] | None, halo: int | Sequence[int] | None) -> None:
    """See, where no volume is at hand yet, that blocks can be made of these sizes.

    Args:
        block_size: as for `BlockPlan.make`, or None.
        halo: as for `BlockPlan.make`, or None.

    Raises:
        ValueError, TypeError: as `BlockPlan.make`.
    """
    if block_size is not None:
        _triple("block_size", block_size, minimum=1)
    if halo is not None:
        _triple("halo", halo, minimum=0)


def _triple(name: str, value: int | Sequence[int], *, minimum: int) -> Triple:
    values = [value] * 3 if isinstance(value, int) else list(value)
    if len(values) != 3:
        raise ValueError(f"{name} has {len(values)} values: {values}; pass one integer or three (z, y, x)")
    for v in values:
        if isinstance(v, bool) or not hasattr(v, "__index__"):
            raise TypeError(f"{name} holds {v!r}; pass integers (z, y, x) in voxels")
        if v < minimum:
            raise ValueError(f"{name} is {values}; every value must be at least {minimum}")
    return int(values[0]), int(values[1]), int(values[2])
