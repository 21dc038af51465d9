"""The plan of blocks: what a block owns, what it reads, and which blocks see the same voxels.

Owned ROIs tile the volume; a read ROI is the owned ROI plus the halo on every side, clipped to the volume. A block's
index is its place in raster order of the grid, so it depends on the plan alone. This file knows geometry only: no
arrays, no files, no predictor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

Roi = tuple[int, int, int, int, int, int]
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Block:
    """One block of the plan.

    Attributes:
        index: place in raster order of the grid, from 0.
        position: (i, j, k) in the grid.
        owned: the ROI that this block alone writes, volume voxels, half-open.
        read: the ROI that this block sees, owned + halo clipped to the volume.
    """

    index: int
    position: Triple
    owned: Roi
    read: Roi


@dataclass(frozen=True)
class BlockPlan:
    """A grid of blocks over a volume.

    Attributes:
        shape: (Z, Y, X) of the volume.
        block_size: (z, y, x) of an owned ROI; the last one of an axis is clipped at the volume's end.
        halo: (z, y, x) voxels read beyond the owned ROI on either side.
        grid: number of blocks per axis.
    """

    shape: Triple
    block_size: Triple
    halo: Triple
    grid: Triple

    @classmethod
    def make(cls, *, shape: Sequence[int], block_size: int | Sequence[int], halo: int | Sequence[int]) -> BlockPlan:
        """A checked plan.

        Args:
            shape: (Z, Y, X) of the volume, each at least 1.
            block_size: int or (z, y, x), voxels, each at least 1; larger than the volume means one block on that axis.
            halo: int or (z, y, x), voxels, each at least 0, at least 1 on an axis that holds more than one block.

        Raises:
            ValueError: if a number is out of its range or has not 3 values.
            TypeError: if a number is not an integer.
        """
        extent = _triple("shape", shape, minimum=1)
        size = _triple("block_size", block_size, minimum=1)
        margin = _triple("halo", halo, minimum=0)
        size = _as_triple(min(s, e) for s, e in zip(size, extent, strict=True))
        grid = _as_triple(-(-e // s) for s, e in zip(size, extent, strict=True))
        for axis, count, h in zip("zyx", grid, margin, strict=True):
            if count > 1 and h < 1:
                raise ValueError(
                    f"halo is 0 along {axis}, where the volume has {count} blocks: no voxel is seen by two blocks, so "
                    f"objects on a face cannot be stitched; pass a halo of at least 1 (about an object's radius), or a "
                    f"block_size of {extent['zyx'.index(axis)]} along {axis}"
                )
        return cls(shape=extent, block_size=size, halo=margin, grid=grid)

    def __len__(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def __iter__(self) -> Iterator[Block]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Block:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        _, rows, columns = self.grid
        position = (index // (rows * columns), index // columns % rows, index % columns)
        first = [p * s for p, s in zip(position, self.block_size, strict=True)]
        stop = [min(f + s, e) for f, s, e in zip(first, self.block_size, self.shape, strict=True)]
        owned = (first[0], first[1], first[2], stop[0], stop[1], stop[2])
        read_first = [max(f - h, 0) for f, h in zip(first, self.halo, strict=True)]
        read_stop = [min(s + h, e) for s, h, e in zip(stop, self.halo, self.shape, strict=True)]
        read = (read_first[0], read_first[1], read_first[2], read_stop[0], read_stop[1], read_stop[2])
        return Block(index=index, position=position, owned=owned, read=read)

    def neighbours(self, index: int) -> list[int]:
        """Blocks whose read ROI overlaps the read ROI of this one, ascending, without itself.

        A halo of more than half a block reaches beyond the 26 adjacent blocks.
        """
        block = self[index]
        # Two read ROIs that are d blocks apart overlap iff (d - 1) * size < 2 * halo.
        reach = [-(-2 * h // s) for h, s in zip(self.halo, self.block_size, strict=True)]
        axes = [
            range(max(p - r, 0), min(p + r, g - 1) + 1)
            for p, r, g in zip(block.position, reach, self.grid, strict=True)
        ]
        found = ((i * self.grid[1] + j) * self.grid[2] + k for i, j, k in product(*axes))
        return [other for other in found if other != index and intersection(block.read, self[other].read) is not None]

    def owners(self, roi: Roi) -> list[int]:
        """Blocks whose owned ROI overlaps a ROI, ascending."""
        axes = [
            range(max(roi[a], 0) // self.block_size[a], -(-min(roi[a + 3], self.shape[a]) // self.block_size[a]))
            for a in range(3)
        ]
        return [(i * self.grid[1] + j) * self.grid[2] + k for i, j, k in product(*axes)]


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


def _as_triple(values: Iterator[int]) -> Triple:
    a, b, c = values
    return a, b, c


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
