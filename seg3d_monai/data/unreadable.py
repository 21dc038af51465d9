"""A volume of which some regions cannot be read: they are filled, everything else is read as it is.

Must not know: files, what the filling means.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from seg3d_monai.data.volume import Roi, Volume, check_roi


class PatchedVolume(Volume):
    """Reads a volume around some regions.

    Args:
        volume: what is read.
        regions: (z1, y1, x1, z2, y2, x2) that are never read.
        value: what voxels in them read as.
    """

    def __init__(self, volume: Volume, regions: Sequence[Sequence[int]], value: int) -> None:
        self.shape, self.dtype, self.spacing_um = volume.shape, volume.dtype, volume.spacing_um
        self.path, self.chunk_shape = volume.path, volume.chunk_shape
        self._volume = volume
        self._regions = [tuple(int(n) for n in region) for region in regions]
        self._value = value

    def read(self, roi: Sequence[int]) -> np.ndarray:
        """Read a region; see `Volume.read`."""
        whole = check_roi(roi, self.shape)
        if not any(_overlap(whole, region) for region in self._regions):
            return self._volume.read(whole)
        z, y, x = whole[:3]
        result = np.full((self.shape[0], *(b - a for a, b in zip(whole[:3], whole[3:], strict=True))), self._value)
        result = result.astype(self.dtype)
        for z1, y1, x1, z2, y2, x2 in _around(whole, self._regions):
            part = self._volume.read((z1, y1, x1, z2, y2, x2))
            result[:, z1 - z : z2 - z, y1 - y : y2 - y, x1 - x : x2 - x] = part
        return result


def _around(roi: Roi, holes: Sequence[Sequence[int]]) -> Iterator[Roi]:
    """Disjoint boxes that cover a region but for the holes in it."""
    for number, hole in enumerate(holes):
        inner = _overlap(roi, hole)
        if inner is None:
            continue
        rest = list(roi)
        # Cut off what lies before and behind the hole, axis by axis; the hole itself is left.
        for axis in range(3):
            for low, high in ((rest[axis], inner[axis]), (inner[axis + 3], rest[axis + 3])):
                if low < high:
                    slab = [*rest[:axis], low, *rest[axis + 1 : axis + 3], high, *rest[axis + 4 :]]
                    piece = (slab[0], slab[1], slab[2], slab[3], slab[4], slab[5])
                    yield from _around(piece, holes[number + 1 :])
            rest[axis], rest[axis + 3] = inner[axis], inner[axis + 3]
        return
    yield roi


def _overlap(a: Sequence[int], b: Sequence[int]) -> Roi | None:
    z, y, x = (max(p, q) for p, q in zip(a[:3], b[:3], strict=True))
    d, h, w = (min(p, q) for p, q in zip(a[3:], b[3:], strict=True))
    return (z, y, x, d, h, w) if z < d and y < h and x < w else None
