"""The regular grid of crops over a volume: where each crop lies, and how the faces of all crops cut the volume.

A crop's place follows from its number, so the index stores none. The faces of all crops cut the volume into cells; a
crop is a union of cells, whatever the overlap.

Must not know: voxels, files.
"""

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from math import prod

import numpy as np

Roi = tuple[int, int, int, int, int, int]


def crop_starts(size: int, crop: int, stride: int) -> list[int]:
    """First voxels of the crops along one axis; the last crop is flush with the border, a short axis has one crop."""
    if size <= crop:
        return [0]
    starts = list(range(0, size - crop + 1, stride))
    if starts[-1] != size - crop:
        starts.append(size - crop)
    return starts


class CropGrid:
    """The crops of one volume, numbered from 0 in z, y, x order.

    Args:
        shape: (z, y, x) voxels of the volume.
        crop_size: extent of a crop, (z, y, x) voxels; clipped to the volume.
        stride: step of the grid, (z, y, x) voxels, at most the crop size.

    Attributes:
        extent: (z, y, x) voxels that every crop has.
        starts: first voxels of the crops along z, y and x, int64.
    """

    def __init__(self, shape: Sequence[int], crop_size: Sequence[int], stride: Sequence[int]) -> None:
        self.shape = tuple(int(n) for n in shape)
        self.extent = tuple(min(int(c), n) for c, n in zip(crop_size, self.shape, strict=True))
        self.starts = tuple(
            np.array(crop_starts(n, c, int(s)), np.int64)
            for n, c, s in zip(self.shape, self.extent, stride, strict=True)
        )

    @property
    def counts(self) -> tuple[int, int, int]:
        """Crops along z, y and x."""
        z, y, x = (len(starts) for starts in self.starts)
        return z, y, x

    def __len__(self) -> int:
        return prod(self.counts)

    def roi(self, number: int) -> Roi:
        """(z1, y1, x1, z2, y2, x2) of a crop by its number."""
        place = np.unravel_index(number, self.counts)
        z, y, x = (int(starts[i]) for starts, i in zip(self.starts, place, strict=True))
        return z, y, x, z + self.extent[0], y + self.extent[1], x + self.extent[2]

    def corners(self) -> np.ndarray:
        """First voxels (z, y, x) of all crops, int64 [n, 3]."""
        return np.stack(np.meshgrid(*self.starts, indexing="ij"), axis=-1).reshape(-1, 3)

    @cached_property
    def faces(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ascending borders of the cells along z, y and x, from 0 to the extent of the volume."""
        z, y, x = (
            np.unique(np.concatenate([[0, size], starts, starts + extent]))
            for size, starts, extent in zip(self.shape, self.starts, self.extent, strict=True)
        )
        return z, y, x

    def covering(self, axis: int, voxels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The crops along an axis that hold some voxels, as first and one past the last of each voxel."""
        starts = self.starts[axis]
        return (
            np.searchsorted(starts, voxels - self.extent[axis], side="right"),
            np.searchsorted(starts, voxels, side="right"),
        )

    def nearest(self, roi: Sequence[int]) -> int:
        """Number of the crop whose centre is nearest to that of a region (z1, y1, x1, z2, y2, x2)."""
        number = 0
        for axis, (starts, extent) in enumerate(zip(self.starts, self.extent, strict=True)):
            wanted = roi[axis] + roi[axis + 3] - extent
            after = min(bisect_left(starts, (wanted + 1) // 2), len(starts) - 1)
            # Of two that are equally near the first is taken.
            best = min((max(after - 1, 0), after), key=lambda i: abs(2 * int(starts[i]) - wanted))
            number = number * len(starts) + best
        return number
