"""NIfTI images, read lazily through nibabel.

NIfTI stores x fastest and calls its axes (x, y, z, t, ...); here they are reversed, so an `axes` given by the user is
in the order (..., z, y, x) as everywhere else. Orientation matrices are left alone: voxels stay as stored.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from seg3d_monai.data.stored_array import UNKNOWN_AXIS, StoredArray, micrometres


class NiftiArray(StoredArray):
    """The image of a NIfTI file.

    Args:
        path: a `.nii` or `.nii.gz` file; the latter is decompressed from its start at every read.
        level: 0; NIfTI has no pyramids.

    Raises:
        ValueError: the file is damaged, or level is not 0.
    """

    def __init__(self, path: str | Path, level: int = 0) -> None:
        if level != 0:
            raise ValueError(f"{path}: level={level} is not there; NIfTI has only level 0")
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

    def read_region(self, region: Sequence[slice]) -> np.ndarray:
        """Read a box; of an uncompressed file only the bytes that it needs."""
        index = tuple(reversed(region))
        if any(part.stop == part.start for part in region):
            return np.empty([part.stop - part.start for part in region], dtype=self.dtype)
        try:
            block = self._data[index]
        except Exception as error:
            raise ValueError(f"{self.location}: is damaged ({error}); copy or write the file again") from error
        return np.array(block.T, dtype=self.dtype, order="C")
