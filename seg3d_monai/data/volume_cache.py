"""A least-recently-used cache of decoded chunks, bounded in bytes, through which regions of volumes are read.

Chunks are kept as they are stored, whatever crops were asked for, so a cache can never serve one selection with
another's voxels. Where it cannot help, regions are read straight from the file: one that touches a large share of what
may be kept, and all of them once it has shown that crops hardly ever meet the same chunks again.

Must not know: sampling, normalisation (voxels are raw), SQLite, torch.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import product
from math import prod

import numpy as np

from seg3d_monai.data.volume import Roi, Volume

_LARGEST_SHARE = 4  # one region may touch at most this fraction of the cache
_LEAST_VOXELS = 1 << 17  # smaller chunks are kept several together
_TRIAL = 3  # times its size that a cache reads before it is judged
_LEAST_HITS = 0.2  # share of the bytes asked for that must then have been there
_MAX_OPEN = 256  # volumes whose metadata are kept


class VolumeCache:
    """Reads regions, from memory where their chunks were read before.

    Args:
        max_bytes: bytes to keep; 0 keeps nothing.

    Attributes:
        num_bytes: bytes that are kept.
        hit_bytes: bytes of the chunks that were asked for and were there.
        miss_bytes: bytes of those that had to be read.

    Raises:
        ValueError: if `max_bytes` is negative.
    """

    def __init__(self, *, max_bytes: int = 1 << 30) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes={max_bytes} is negative; use 0 for no cache")
        self.max_bytes = max_bytes
        self.num_bytes = self.hit_bytes = self.miss_bytes = 0
        self._chunks: OrderedDict[tuple[Hashable, Roi], np.ndarray] = OrderedDict()
        self._volumes: OrderedDict[Hashable, Volume] = OrderedDict()
        self._has_failed = False

    def read(self, key: Hashable, open_volume: Callable[[], Volume], roi: Sequence[int]) -> np.ndarray:
        """Read a region of a volume.

        Args:
            key: what identifies the volume and its content.
            open_volume: opens it; not called where it was opened lately.
            roi: (z1, y1, x1, z2, y2, x2) within the volume.

        Returns:
            A new array [C, d, h, w].
        """
        volume = self._open(key, open_volume)
        if self._has_failed or self.max_bytes == 0:
            return volume.read(roi)
        voxel_bytes = volume.shape[0] * volume.dtype.itemsize
        boxes = list(_chunks_of(volume, roi))
        if sum(map(_voxels, boxes)) * voxel_bytes * _LARGEST_SHARE > self.max_bytes:
            return volume.read(roi)
        result = np.empty((volume.shape[0], *_extent(roi)), volume.dtype)
        missing = []
        for box in boxes:
            chunk = self._chunks.get((key, box))
            if chunk is None:
                missing.append(box)
                continue
            self._chunks.move_to_end((key, box))
            self.hit_bytes += chunk.nbytes
            _copy_overlap(chunk, box, result, roi)
        if missing:
            # One read of all that is missing lets the library decode it in parallel.
            low, high = np.min(missing, axis=0)[:3].tolist(), np.max(missing, axis=0)[3:].tolist()
            hull = (*low, *high)
            voxels = volume.read(hull)
            _copy_overlap(voxels, hull, result, roi)
            for box in missing:
                self._keep((key, box), np.empty((volume.shape[0], *_extent(box)), volume.dtype))
                _copy_overlap(voxels, hull, self._chunks[(key, box)], box)
            self._judge()
        return result

    def _open(self, key: Hashable, open_volume: Callable[[], Volume]) -> Volume:
        if key not in self._volumes:
            self._volumes[key] = open_volume()
            if len(self._volumes) > _MAX_OPEN:
                self._volumes.popitem(last=False)
        self._volumes.move_to_end(key)
        return self._volumes[key]

    def _keep(self, key: tuple[Hashable, Roi], chunk: np.ndarray) -> None:
        self._chunks[key] = chunk
        self.num_bytes += chunk.nbytes
        self.miss_bytes += chunk.nbytes
        while self.num_bytes > self.max_bytes:
            _, oldest = self._chunks.popitem(last=False)
            self.num_bytes -= oldest.nbytes

    def _judge(self) -> None:
        """Give up keeping chunks that nobody asks for again: to copy them costs time and memory."""
        asked = self.hit_bytes + self.miss_bytes
        if self.miss_bytes > _TRIAL * self.max_bytes and self.hit_bytes < _LEAST_HITS * asked:
            self._has_failed = True
            self._chunks.clear()
            self.num_bytes = 0


def _chunks_of(volume: Volume, roi: Sequence[int]) -> Iterator[Roi]:
    """The pieces of whole stored chunks, none of them tiny, that a region touches."""
    extents = volume.shape[1:]
    size = list(volume.chunk_shape)
    while prod(size) < _LEAST_VOXELS and any(n < extent for n, extent in zip(size, extents, strict=True)):
        shortest = min((axis for axis in range(3) if size[axis] < extents[axis]), key=size.__getitem__)
        size[shortest] *= 2
    starts = (range(low // n * n, high, n) for low, high, n in zip(roi[:3], roi[3:], size, strict=True))
    for z, y, x in product(*starts):
        yield z, y, x, min(z + size[0], extents[0]), min(y + size[1], extents[1]), min(x + size[2], extents[2])


def _copy_overlap(source: np.ndarray, source_box: Sequence[int], target: np.ndarray, target_box: Sequence[int]) -> None:
    """Copy what two boxes have in common, arrays [C, d, h, w] over each."""
    low = [max(a, b) for a, b in zip(source_box[:3], target_box[:3], strict=True)]
    high = [min(a, b) for a, b in zip(source_box[3:], target_box[3:], strict=True)]
    taken, put = (
        (slice(None), *(slice(a - start, b - start) for a, b, start in zip(low, high, box[:3], strict=True)))
        for box in (source_box, target_box)
    )
    target[put] = source[taken]


def _extent(box: Sequence[int]) -> tuple[int, int, int]:
    return box[3] - box[0], box[4] - box[1], box[5] - box[2]


def _voxels(box: Sequence[int]) -> int:
    return prod(_extent(box))
