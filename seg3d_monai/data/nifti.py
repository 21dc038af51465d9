"""NIfTI images, read lazily through nibabel.

NIfTI stores x fastest and calls its axes (x, y, z, t, ...); here they are reversed, so an `axes` given by the user is
in the order (..., z, y, x) as everywhere else. Orientation matrices are left alone: voxels stay as stored.

A `.nii.gz` cannot be read by the region: gzip starts at the beginning. It is decompressed as a whole at the first read,
with a warning where it is large, and the last two such volumes are kept in memory.

nibabel is imported where a file is opened: it takes a tenth of a second, which processes without NIfTI need not pay.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from seg3d_monai.data.stored_array import UNKNOWN_AXIS, StoredArray, StoredLevel, find_level, micrometres

LARGE_BYTES = 2**26
"""Decompressed size from which a `.nii.gz` is worth a warning."""
_decompressing = threading.Lock()


class NiftiArray(StoredArray):
    """The image of a NIfTI file.

    Args:
        path: a `.nii` or `.nii.gz` file; of the latter all is decompressed at the first read.
        level: 0; NIfTI has no pyramids.

    Raises:
        ValueError: the file is damaged, or level is not 0.
    """

    def __init__(self, path: str | Path, level: int | str = 0) -> None:
        import nibabel

        try:
            image: Any = nibabel.load(path)
        except Exception as error:
            raise ValueError(f"{path}: cannot be read as NIfTI ({error}); write the file again") from error
        self.location = str(path)
        self.num_bytes = os.path.getsize(path)
        self._data = image.dataobj
        self.shape = tuple(int(n) for n in image.shape[::-1])
        end = self._data.offset + int(np.prod(self.shape)) * np.dtype(self._data.dtype).itemsize
        if str(path).endswith(".nii") and end > self.num_bytes:
            raise ValueError(
                f"{path}: truncated, its data end at byte {end} and the file has {self.num_bytes}; "
                "copy or write it again"
            )
        self._is_scaled = (self._data.slope, self._data.inter) != (1.0, 0.0)
        stored = np.dtype(self._data.dtype).newbyteorder("=")
        self.dtype = np.dtype(np.float32) if self._is_scaled else stored
        # The fourth axis is time by the standard and channels as often as not: let the user say unless it has length 1.
        self.axes = (UNKNOWN_AXIS * max(0, len(self.shape) - 3) + "ZYX")[-len(self.shape) :]
        self.chunks = (*(1 for _ in self.shape[:-2]), *self.shape[-2:])
        unit_um = micrometres(str(image.header.get_xyzt_units()[0]))
        zooms = [float(zoom) for zoom in image.header.get_zooms()[:3]]
        self.spacing_um = {}
        if unit_um is not None:
            self.spacing_um = {axis: zoom * unit_um for axis, zoom in zip("XYZ", zooms, strict=False)}
        self.levels = (StoredLevel("0", self.spacing_um),)
        self.level = find_level(level, self.levels, self.location)
        self._is_gzip = str(path).lower().endswith(".gz")
        self.is_mapped = True  # or in memory, as a whole

    def read_region(self, region: Sequence[slice]) -> np.ndarray:
        """Read a box; of an uncompressed file only the bytes that it needs."""
        if self._is_gzip:
            return np.array(self._whole()[tuple(region)], dtype=self.dtype, order="C")
        index = tuple(reversed(region))
        if any(part.stop == part.start for part in region):
            return np.empty([part.stop - part.start for part in region], dtype=self.dtype)
        try:
            block = self._data[index]
        except Exception as error:
            raise ValueError(f"{self.location}: is damaged ({error}); copy or write the file again") from error
        return np.array(block.T, dtype=self.dtype, order="C")

    def _whole(self) -> np.ndarray:
        """All voxels of a `.nii.gz`, (..., z, y, x)."""
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        if size >= LARGE_BYTES:
            warnings.warn(
                f"{self.location}: a .nii.gz cannot be read by the region, so all is decompressed, {size / 1e6:.0f} "
                "MB of memory; write it once with `seg3d convert` as OME-Zarr, or as .nii",
                stacklevel=2,
            )
        # Of several threads one decompresses.
        with _decompressing:
            try:
                return _decompressed(self.location, self.num_bytes, os.stat(self.location).st_mtime_ns, self.dtype.str)
            except Exception as error:
                raise ValueError(f"{self.location}: is damaged ({error}); copy or write the file again") from error


@lru_cache(maxsize=2)
def _decompressed(path: str, num_bytes: int, modified: int, dtype: str) -> np.ndarray:
    """All voxels, scaled as the header says; size and time only tell whether the file is still the same."""
    import nibabel

    stored: Any = nibabel.load(path).dataobj  # type: ignore[attr-defined]
    raw = np.asarray(stored.get_unscaled()).T
    if (stored.slope, stored.inter) == (1.0, 0.0):
        return raw
    scaled = np.empty(raw.shape, dtype=dtype)
    for target, plane in zip(scaled, raw, strict=True):
        target[...] = plane.astype(np.float64) * stored.slope + stored.inter
    return scaled
