"""A least-recently-used cache of small decoded volumes, bounded in bytes; large volumes are read by the region.

Whole volumes are kept, whatever crops were asked for, so a cache can never serve one selection with another's voxels.
Must not know: sampling, normalisation (voxels are raw), SQLite.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from seg3d_monai.data.volume import Volume

_LARGEST_SHARE = 4  # one volume may fill at most this fraction of the cache


class VolumeCache:
    """Reads regions, from memory where a volume is small enough to be kept.

    Args:
        max_bytes: bytes to keep; 0 keeps nothing.

    Raises:
        ValueError: if `max_bytes` is negative.
    """

    def __init__(self, *, max_bytes: int = 1 << 30) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes={max_bytes} is negative; use 0 for no cache")
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._arrays: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._volumes: dict[Hashable, Volume] = {}

    def __getstate__(self) -> dict[str, int]:
        return {"max_bytes": self.max_bytes}  # voxels do not travel to workers

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(max_bytes=state["max_bytes"])  # type: ignore[misc]

    def read(self, key: Hashable, open_volume: Callable[[], Volume], roi: Sequence[int]) -> np.ndarray:
        """Read a region of a volume.

        Args:
            key: what identifies the volume and its content.
            open_volume: opens it, called at most once per key.
            roi: (z1, y1, x1, z2, y2, x2) within the volume.

        Returns:
            [C, d, h, w], possibly a view of a cached array; not to be written to.
        """
        array = self._arrays.get(key)
        if array is None:
            if key not in self._volumes:
                self._volumes[key] = open_volume()
            volume = self._volumes[key]
            size = int(np.prod(volume.shape, dtype=np.int64)) * np.dtype(volume.dtype).itemsize
            if size * _LARGEST_SHARE > self.max_bytes:
                return volume.read(roi)
            array = volume.read((0, 0, 0, *volume.shape[1:]))
            self._arrays[key] = array
            self.num_bytes += array.nbytes
            while self.num_bytes > self.max_bytes:
                _, oldest = self._arrays.popitem(last=False)
                self.num_bytes -= oldest.nbytes
        self._arrays.move_to_end(key)
        z1, y1, x1, z2, y2, x2 = roi
        return array[:, z1:z2, y1:y2, x1:x2]
