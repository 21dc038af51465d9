"""An array of a stack's voxels that is sliced without being read: what napari asks for is read, and no more.

Indexing gives another such array; `numpy.asarray` reads the box around what is left of it. It must not know napari.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from seg3d_monai.data.memory_limit import machine_memory
from seg3d_monai.data.volume import Roi

Read = Callable[[int, Roi], np.ndarray]
"""Time point and region (z1, y1, x1, z2, y2, x2) -> voxels [z, y, x]."""


class LazyArray:
    """Voxels of one channel, [Z, Y, X] or [T, Z, Y, X], or a part of them.

    Args:
        read: reads a region of a time point.
        axes: t, z, y, x; a range of indices for an axis that the array has, an index for one that it has not.
        dtype: of the voxels that `read` gives.
        most_bytes: that are read at once; None is a quarter of the machine's memory.

    Attributes:
        shape: extents of its axes.
        dtype: of the voxels.
    """

    def __init__(
        self, read: Read, axes: Sequence[range | int], dtype: np.dtype[Any], most_bytes: int | None = None
    ) -> None:
        assert len(axes) == 4
        self._read = read
        self._axes = tuple(axes)
        self._most_bytes = most_bytes if most_bytes is not None else (machine_memory() or 2**33) // 4
        self.shape = tuple(len(axis) for axis in self._axes if isinstance(axis, range))
        self.dtype = np.dtype(dtype)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of voxels."""
        return prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        """A part of the array, not read yet; read at once where the key is neither integers nor slices.

        Raises:
            IndexError: an index is outside, or there are more of them than axes.
        """
        keys = list(key) if isinstance(key, tuple) else [key]
        if any(isinstance(one, list | np.ndarray) or one is None for one in keys):
            return np.asarray(self)[key]
        if any(one is Ellipsis for one in keys):
            place = next(i for i, one in enumerate(keys) if one is Ellipsis)
            keys[place : place + 1] = [slice(None)] * (self.ndim - len(keys) + 1)
        if len(keys) > self.ndim:
            raise IndexError(f"{len(keys)} indices for an array of {self.ndim} axes")
        left = iter(keys)
        axes: list[range | int] = []
        for axis in self._axes:
            one = next(left, slice(None)) if isinstance(axis, range) else slice(None)
            if isinstance(axis, int):
                axes.append(axis)
            else:
                axes.append(axis[one] if isinstance(one, slice) else axis[operator.index(one)])
        return LazyArray(self._read, axes, self.dtype, self._most_bytes)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read it.

        Raises:
            ValueError: it is larger than what may be read at once, or its data are damaged.
        """
        voxels = self._voxels()
        return voxels if dtype is None else voxels.astype(dtype, copy=False)

    def _voxels(self) -> np.ndarray:
        if self.size == 0:
            return np.zeros(self.shape, self.dtype)
        times, *spans = ([axis] if isinstance(axis, int) else axis for axis in self._axes)
        low, high = [min(span) for span in spans], [max(span) + 1 for span in spans]
        num_bytes = len(times) * prod(b - a for a, b in zip(low, high, strict=True)) * self.dtype.itemsize
        if num_bytes > self._most_bytes:
            raise ValueError(
                f"{num_bytes / 1e9:.1f} GB would have to be read at once; view a part with --roi or a coarser level "
                "with --level, or write the stack with levels: seg3d convert"
            )
        roi = (low[0], low[1], low[2], high[0], high[1], high[2])
        within = tuple(
            span[0] - a if isinstance(axis, int) else _steps(axis, a)
            for axis, span, a in zip(self._axes[1:], spans, low, strict=True)
        )
        parts = [np.asarray(self._read(time, roi)[within], self.dtype) for time in times]
        return np.stack(parts) if isinstance(self._axes[0], range) else parts[0]


def _steps(axis: range, start: int) -> slice:
    """The slice of voxels read from `start` on that an axis' indices stand for."""
    if axis.step > 0:
        return slice(axis[0] - start, axis[-1] - start + 1, axis.step)
    end = axis[-1] - start - 1
    return slice(axis[0] - start, None if end < 0 else end, axis.step)
