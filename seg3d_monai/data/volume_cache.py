"""A cache of decoded chunks, bounded in bytes, through which regions of volumes are read.

Chunks are kept as they are stored, whatever crops were asked for, so a cache can never serve one selection with
another's voxels. A chunk is kept once it is asked for a second time while its name is still remembered (the admission
of 2Q, Johnson and Shasha 1994), and what was used longest ago goes first: crops at random places of a large volume
hardly ever meet, and then take neither memory nor the time to copy them. Where the cache cannot help, regions are read
straight from the file: one that touches a large share of what may be kept, and all of them once it has shown that
crops do not meet the same chunks again.

Must not know: sampling, normalisation (voxels are raw), SQLite, torch.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import product
from math import prod

import numpy as np

from seg3d_monai.data.freed_memory import give_back
from seg3d_monai.data.volume import Roi, Volume

_LARGEST_SHARE = 4  # one region may touch at most this fraction of the cache
_LEAST_VOXELS = 1 << 17  # smaller chunks are kept several together
_TRIAL = 3  # times its size that a cache reads before it is judged
_LEAST_HITS = 0.2  # share of the bytes asked for that must then have been asked for lately
_MAX_OPEN = 256  # volumes whose metadata are kept

_Name = tuple[Hashable, Roi]  # of a chunk: its volume's key, its box


class VolumeCache:
    """Reads regions, from memory where their chunks were read before.

    Args:
        max_bytes: bytes to keep; 0 keeps nothing.

    Attributes:
        num_bytes: bytes that are kept.
        hit_bytes: bytes of the chunks that were asked for and were there.
        miss_bytes: bytes of those that had to be read.
        again_bytes: bytes of those among them that had been asked for lately.

    Raises:
        ValueError: if `max_bytes` is negative.
    """

    def __init__(self, *, max_bytes: int = 1 << 30) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes={max_bytes} is negative; use 0 for no cache")
        self.max_bytes = max_bytes
        self.num_bytes = self.hit_bytes = self.miss_bytes = self.again_bytes = 0
        self._chunks: OrderedDict[_Name, np.ndarray] = OrderedDict()
        self._asked: OrderedDict[_Name, int] = OrderedDict()  # bytes of chunks that are not kept
        self._asked_bytes = 0
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
        there = [box for box in boxes if (key, box) in self._chunks]
        missing = [box for box in boxes if (key, box) not in self._chunks]
        to_keep = [box for box in missing if self._was_asked((key, box), _voxels(box) * voxel_bytes)]
        if missing and not there and not to_keep:
            self._judge()
            return volume.read(roi)
        result = np.empty((volume.shape[0], *_extent(roi)), volume.dtype)
        for box in there:
            chunk = self._chunks[(key, box)]
            self._chunks.move_to_end((key, box))
            self.hit_bytes += chunk.nbytes
            _copy_overlap(chunk, box, result, roi)
        if missing:
            # One read of all that is missing lets the library decode it in parallel.
            low, high = np.min(missing, axis=0)[:3].tolist(), np.max(missing, axis=0)[3:].tolist()
            hull = (*low, *high)
            voxels = volume.read(hull)
            _copy_overlap(voxels, hull, result, roi)
            for box in to_keep:
                chunk = np.empty((volume.shape[0], *_extent(box)), volume.dtype)
                _copy_overlap(voxels, hull, chunk, box)
                self._keep((key, box), chunk)
            self._judge()
        return result

    def _open(self, key: Hashable, open_volume: Callable[[], Volume]) -> Volume:
        if key not in self._volumes:
            self._volumes[key] = open_volume()
            if len(self._volumes) > _MAX_OPEN:
                self._volumes.popitem(last=False)
        self._volumes.move_to_end(key)
        return self._volumes[key]

    def _was_asked(self, name: _Name, num_bytes: int) -> bool:
        """Whether a chunk that is not kept was asked for lately; else its name is remembered."""
        self.miss_bytes += num_bytes
        if self._asked.pop(name, None) is not None:
            self._asked_bytes -= num_bytes
            self.again_bytes += num_bytes
            return True
        self._asked[name] = num_bytes
        self._asked_bytes += num_bytes
        while self._asked_bytes > self.max_bytes:
            self._asked_bytes -= self._asked.popitem(last=False)[1]
        return False

    def _keep(self, name: _Name, chunk: np.ndarray) -> None:
        self._chunks[name] = chunk
        self.num_bytes += chunk.nbytes
        while self.num_bytes > self.max_bytes:
            _, oldest = self._chunks.popitem(last=False)
            self.num_bytes -= oldest.nbytes

    def _judge(self) -> None:
        """Give up on chunks that nobody asks for again."""
        asked = self.hit_bytes + self.miss_bytes
        if self.miss_bytes > _TRIAL * self.max_bytes and self.hit_bytes + self.again_bytes < _LEAST_HITS * asked:
            self._has_failed = True
            self._chunks.clear()
            self._asked.clear()
            self.num_bytes = self._asked_bytes = 0
            give_back()


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
