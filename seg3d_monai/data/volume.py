"""Volumes: one interface, (C, Z, Y, X), to stacks in files and in memory, read by the region of interest.

`open_volume` is the door. It reads metadata only; `read` then loads just the pages or chunks that a region touches.
Volumes hold no open file, pickle as their path and options, and may be used after a fork.
This file must not know training, models or manifests.
"""

from __future__ import annotations

import hashlib
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import groupby, product
from math import prod
from typing import Any

import numpy as np

from seg3d_monai.data.formats import common_path, open_stored, resolve_source
from seg3d_monai.data.stored_array import StoredArray, StoredLevel, assign_axes, spacing_zyx

Roi = tuple[int, int, int, int, int, int]
Spacing = tuple[float, float, float]
AnyPath = str | os.PathLike[str]

NEAR_SPACING = 0.1
"""Share by which two voxel sizes may differ and still show cells alike: a training zooms cells by as much and more."""
# Up to this many voxels identity() hashes every one of them, above it a regular sample.
IDENTITY_VOXELS = 2**25


class Volume(ABC):
    """A stack of shape (C, Z, Y, X) whose regions can be read one at a time.

    Attributes:
        shape: (C, Z, Y, X).
        dtype: native-endian bool, integer or floating dtype of the voxels.
        spacing_um: micrometres per voxel (z, y, x), or None when unknown.
        path: absolute path of the file or folder (of a list or pattern: the folder of its files) or URL, None for a
            volume in memory.
        chunk_shape: (z, y, x) extent of the pieces in which the voxels are stored; reads that follow it are cheapest.
    """

    shape: tuple[int, int, int, int]
    dtype: np.dtype
    spacing_um: Spacing | None
    path: str | None
    chunk_shape: tuple[int, int, int]

    @abstractmethod
    def read(self, roi: Sequence[int]) -> np.ndarray:
        """Read a region of all channels.

        Args:
            roi: (z1, y1, x1, z2, y2, x2) in voxels, half-open, inside the volume.

        Returns:
            A new array [C, z2-z1, y2-y1, x2-x1] of the volume's dtype.

        Raises:
            ValueError: the region is inverted or leaves the volume, or its data are damaged.
        """

    def identity(self) -> dict[str, Any]:
        """Describe the data for "is this still the same input?".

        Returns:
            A JSON-able dict of shape, dtype, spacing, file size and a digest of the voxels (all of them up to
            `IDENTITY_VOXELS`, else a regular sample), in which damaged parts count as such. No path and no time: a
            copy has the same identity.
        """
        digest = hashlib.blake2b(digest_size=16)
        for voxels in self._read_each(sample_rois(self.shape[1:], IDENTITY_VOXELS // self.shape[0])):
            # Damaged: whoever needs these voxels will say so.
            digest.update(b"unreadable" if voxels is None else voxels.tobytes())
        return {
            "shape": list(self.shape),
            "dtype": self.dtype.name,
            "spacing_um": None if self.spacing_um is None else list(self.spacing_um),
            "num_bytes": self._num_bytes(),
            "digest": digest.hexdigest(),
        }

    def _num_bytes(self) -> int | None:
        return None

    def _read_each(self, rois: Sequence[Roi]) -> Iterator[np.ndarray | None]:
        """The voxels of each region, None where they are damaged."""
        for roi in rois:
            try:
                yield self.read(roi)
            except ValueError:
                yield None


class ArrayVolume(Volume):
    """A volume in memory.

    Args:
        array: [Z, Y, X] or [C, Z, Y, X], bool, integer or floating; not copied.
        spacing_um: micrometres per voxel (z, y, x), None when unknown.

    Raises:
        ValueError: the array has another number of axes, its dtype is neither bool, integer nor floating, or spacing_um
            is not three positive numbers.
    """

    def __init__(self, array: np.ndarray, spacing_um: Sequence[float] | None = None) -> None:
        array = np.asarray(array)
        if array.ndim not in (3, 4):
            raise ValueError(f"array must be [Z, Y, X] or [C, Z, Y, X], not of shape {array.shape}")
        self.array = array[None] if array.ndim == 3 else array
        self.dtype = _native_dtype(array.dtype, "array")
        self.shape = (self.array.shape[0], self.array.shape[1], self.array.shape[2], self.array.shape[3])
        self.spacing_um = None if spacing_um is None else check_spacing(spacing_um)
        self.path = None
        self.chunk_shape = (max(1, self.shape[1]), max(1, self.shape[2]), max(1, self.shape[3]))

    def read(self, roi: Sequence[int]) -> np.ndarray:
        """Copy a region; see `Volume.read`."""
        z1, y1, x1, z2, y2, x2 = check_roi(roi, self.shape)
        return np.array(self.array[:, z1:z2, y1:y2, x1:x2], dtype=self.dtype, order="C")


class StoredVolume(Volume):
    """A volume in a file or folder; made by `open_volume`, whose arguments it takes.

    Attributes:
        num_times: time points that are stored.
        level: pyramid level, 0 is full resolution.
        levels: all levels, finest first, with the voxel sizes that the file gives.
        num_channels: channels that are stored.
    """

    def __init__(
        self,
        path: AnyPath | Sequence[AnyPath],
        axes: str | None = None,
        spacing: Sequence[float] | None = None,
        channels: Sequence[int] | int | None = None,
        time: int = 0,
        level: int | str = 0,
        scene: int | str | None = None,
    ) -> None:
        self._source = resolve_source(path)
        self._scene = scene
        self.path = common_path(self._source)
        stored = open_stored(self._source, level, scene)
        self.level = stored.level
        self.levels: tuple[StoredLevel, ...] = stored.levels
        self._stored: StoredArray | None = stored
        self._process = os.getpid()
        self._stored_shape = stored.shape
        self._axis_of = assign_axes(stored.shape, stored.axes, axes, stored.location)
        if any(n == 0 for n in stored.shape):
            raise ValueError(f"{stored.location}: holds no voxel, its shape is {stored.shape}")
        self.dtype = _native_dtype(stored.dtype, stored.location)
        num_times, num_channels = (stored.shape[self._axis_of[a]] if a in self._axis_of else 1 for a in "TC")
        self.num_times = num_times
        self.num_channels = num_channels
        self._time = operator.index(time)
        if not 0 <= self._time < num_times:
            raise ValueError(f"{stored.location}: time={time} is not there; choose 0 to {num_times - 1}")
        self._channels = _check_channels(channels, num_channels, stored.location)
        extents = [stored.shape[self._axis_of[a]] if a in self._axis_of else 1 for a in "ZYX"]
        chunks = [stored.chunks[self._axis_of[a]] if a in self._axis_of else 1 for a in "ZYX"]
        self.shape = (len(self._channels), extents[0], extents[1], extents[2])
        self.chunk_shape = (min(chunks[0], extents[0]), min(chunks[1], extents[1]), min(chunks[2], extents[2]))
        self.spacing_um = spacing_zyx(stored.spacing_um) if spacing is None else check_spacing(spacing)

    def read(self, roi: Sequence[int]) -> np.ndarray:
        """Read a region from disk; see `Volume.read`."""
        z1, y1, x1, z2, y2, x2 = check_roi(roi, self.shape)
        spans = {"T": slice(self._time, self._time + 1), "Z": slice(z1, z2), "Y": slice(y1, y2), "X": slice(x1, x2)}
        result = np.empty((self.shape[0], z2 - z1, y2 - y1, x2 - x1), dtype=self.dtype)
        if result.size == 0:
            return result
        stored = self._open()
        order = [self._axis_of[a] for a in "TCZYX" if a in self._axis_of]
        order = [i for i in range(len(self._stored_shape)) if i not in order] + order
        for first, count, channel in _runs(self._channels):
            region = [slice(0, 1)] * len(self._stored_shape)
            for letter, axis in self._axis_of.items():
                region[axis] = slice(channel, channel + count) if letter == "C" else spans[letter]
            # All axes but C, Z, Y, X have length 1 and now come first, so the reshape only drops them.
            try:
                block = stored.read_region(region).transpose(order)
            except ValueError as error:
                raise ValueError(f"{error} [read for roi={(z1, y1, x1, z2, y2, x2)}]") from error
            result[first : first + count] = block.reshape(count, *result.shape[1:])
        return result

    def at_level(self, level: int) -> StoredVolume:
        """The same channels and time point at another pyramid level; its voxel size is the one that the file gives.

        Raises:
            ValueError: there is no such level.
        """
        axes = "".join(sorted(self._axis_of, key=self._axis_of.__getitem__))
        return StoredVolume(
            _as_path(self._source), axes=axes, channels=self._channels, time=self._time, level=level, scene=self._scene
        )

    def _open(self) -> StoredArray:
        if self._stored is None or (self._process != os.getpid() and not self._stored.survives_fork):
            stored = open_stored(self._source, self.level, self._scene)
            if stored.shape != self._stored_shape or _native_dtype(stored.dtype, stored.location) != self.dtype:
                raise ValueError(
                    f"{stored.location}: was of shape {self._stored_shape} and {self.dtype}, is now {stored.shape} and "
                    f"{stored.dtype}; open it again"
                )
            self._stored, self._process = stored, os.getpid()
        return self._stored

    def _num_bytes(self) -> int | None:
        return self._open().num_bytes

    def _read_each(self, rois: Sequence[Roi]) -> Iterator[np.ndarray | None]:
        """As for any volume; neighbours that lie in the same stored pieces are read together, each piece once."""
        if self._open().is_mapped:
            yield from super()._read_each(rois)
            return
        for _, neighbours in groupby(rois, key=self._shared_pieces):
            group = list(neighbours)
            try:
                yield from self._read_together(group)
            except ValueError:
                yield from super()._read_each(group)

    def _shared_pieces(self, roi: Roi) -> tuple[int, ...]:
        """Where a region lies along the axes on which its neighbours lie in other stored pieces than it does."""
        _, rows, columns = self.chunk_shape
        along_rows, along_columns = rows <= roi[4] - roi[1], columns <= roi[5] - roi[2]
        return (roi[0], roi[3], *(roi[1::3] if along_rows else ()), *(roi[2::3] if along_columns else ()))

    def _read_together(self, rois: Sequence[Roi]) -> list[np.ndarray]:
        """Regions of the same planes, from as few planes at a time as are stored together."""
        low, high = np.min(rois, axis=0), np.max(rois, axis=0)
        if len(rois) == 1:
            return [self.read(rois[0])]
        extents = [tuple(b - a for a, b in zip(roi[:3], roi[3:], strict=True)) for roi in rois]
        blocks = [np.empty((self.shape[0], *extent), self.dtype) for extent in extents]
        for start in range(int(low[0]), int(high[3]), self.chunk_shape[0]):
            stop = min(start + self.chunk_shape[0], int(high[3]))
            planes = self.read((start, low[1], low[2], stop, high[4], high[5]))
            for block, (z1, y1, x1, _, y2, x2) in zip(blocks, rois, strict=True):
                window = planes[:, :, y1 - low[1] : y2 - low[1], x1 - low[2] : x2 - low[2]]
                block[:, start - z1 : stop - z1] = window
        return blocks

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stored": None}


def open_volume(
    path: AnyPath | Sequence[AnyPath],
    axes: str | None = None,
    spacing: Sequence[float] | None = None,
    channels: Sequence[int] | int | None = None,
    time: int = 0,
    level: int | str = 0,
    scene: int | str | None = None,
) -> Volume:
    """Open a stack without reading its voxels.

    Args:
        path: a TIFF, OME-TIFF, BigTIFF, ImageJ TIFF or NIfTI file; the folder of a Zarr v2 / v3 array or OME-Zarr
            0.4 / 0.5 group (one without an image opens its labels, `labels/instances` first); a folder, a pattern
            ("stack/*.tif") or a list of TIFF files; the URL of a TIFF or Zarr; with the extra `formats` a CZI or Imaris
            file, BigDataViewer's XML, HDF5 or N5, or another N5. docs/formats.md tells more.
        axes: one letter per stored axis out of T, C, Z, Y, X; needed for more than three axes without names, and
            `"YX"` reads a single plane as depth 1. Overrides the file's names.
        spacing: micrometres per voxel (z, y, x); overrides the file's.
        channels: channel numbers to keep, in this order; None keeps all.
        time: index of the time point.
        level: pyramid level: a number, 0 is full resolution; a name, "s1"; or a voxel size, "2um" or "4,1,1um", for the
            level whose voxels come nearest to it.
        scene: number or name of the image where a file holds several.

    Returns:
        A volume of shape (C, Z, Y, X) whose `spacing_um` is None when neither the file nor `spacing` gives it.

    Raises:
        FileNotFoundError: there is nothing at path.
        ValueError: the format or type of voxel is not supported, the file is truncated or damaged, or an option does
            not fit it.
        TypeError: an option has the wrong type.
        ImportError: the format needs a package that is not installed.
        OSError: a server does not answer.
    """
    return StoredVolume(path, axes=axes, spacing=spacing, channels=channels, time=time, level=level, scene=scene)


def check_roi(roi: Sequence[int], shape: Sequence[int]) -> Roi:
    """Check a region against a volume.

    Args:
        roi: (z1, y1, x1, z2, y2, x2) in voxels, half-open.
        shape: the volume's (C, Z, Y, X) or (Z, Y, X).

    Returns:
        The region as six Python ints.

    Raises:
        ValueError: it has not six numbers, is inverted, or leaves the volume.
        TypeError: a corner is not an integer.
    """
    extents = tuple(int(n) for n in shape[-3:])
    corners = tuple(operator.index(value) for value in roi)
    if len(corners) != 6:
        raise ValueError(f"roi={corners} must be (z1, y1, x1, z2, y2, x2)")
    if any(not 0 <= a <= b <= n for a, b, n in zip(corners[:3], corners[3:], extents, strict=True)):
        raise ValueError(
            f"roi={corners} is inverted or leaves the volume of shape (z, y, x) = {extents}; clip it to the volume"
        )
    return corners


def check_spacing(spacing: Sequence[float], name: str = "spacing") -> Spacing:
    """Check a voxel size.

    Args:
        spacing: micrometres per voxel (z, y, x).
        name: of the argument, for the error.

    Returns:
        The three as floats.

    Raises:
        ValueError: they are not three positive, finite numbers.
    """
    try:
        values = [float(value) for value in spacing]
    except (TypeError, ValueError):
        values = []
    if len(values) != 3 or not all(np.isfinite(value) and value > 0 for value in values):
        raise ValueError(f"{name}={spacing!r} must be three positive numbers, micrometres along (z, y, x)")
    return values[0], values[1], values[2]


def storage_rois(volume: Volume, max_voxels: int = 2**24) -> Iterator[Roi]:
    """Tile a volume with regions made of whole stored chunks, in z, y, x order.

    Args:
        volume: what will be read.
        max_voxels: bound on a region's voxels over all channels; a single chunk may exceed it.

    Yields:
        Disjoint regions that cover the volume.
    """
    extents = volume.shape[1:]
    step = list(volume.chunk_shape)
    for axis in (2, 1, 0):
        others = volume.shape[0] * prod(step[:axis]) * prod(step[axis + 1 :])
        chunk = step[axis]
        step[axis] = min(extents[axis], max(chunk, max_voxels // others // chunk * chunk))
    for z, y, x in product(*(range(0, n, max(1, s)) for n, s in zip(extents, step, strict=True))):
        yield z, y, x, min(z + step[0], extents[0]), min(y + step[1], extents[1]), min(x + step[2], extents[2])


def sample_rois(
    extents: Sequence[int], max_voxels: int, block_shape: tuple[int, int, int] = (16, 128, 128)
) -> list[Roi]:
    """A regular grid of sub-blocks that depends on the extents alone.

    Args:
        extents: (z, y, x) of the volume.
        max_voxels: voxels that the blocks may hold together, at least 1.
        block_shape: (z, y, x) extent of one block at most; less where the budget is below 64 of them.

    Returns:
        The whole volume as one region where it fits max_voxels, else disjoint blocks, evenly spread.
    """
    size = [int(n) for n in extents]
    if prod(size) <= max_voxels:
        return [(0, 0, 0, size[0], size[1], size[2])]
    block = [min(a, b) for a, b in zip(block_shape, size, strict=True)]
    # A few large blocks would miss parts of the volume.
    while prod(block) > max(1, max_voxels // 64) and max(block) > 1:
        widest = block.index(max(block))
        block[widest] = (block[widest] + 1) // 2
    room = max(1, max_voxels // prod(block))
    fits = [n // b for n, b in zip(size, block, strict=True)]
    counts = [1, 1, 1]
    while True:
        # Add a block along the axis whose blocks lie furthest apart, while the budget lasts.
        grow = [a for a in range(3) if counts[a] < fits[a] and prod(counts) // counts[a] * (counts[a] + 1) <= room]
        if not grow:
            break
        counts[max(grow, key=lambda a: fits[a] / counts[a])] += 1
    starts = [
        [(2 * i + 1) * n // (2 * k) - b // 2 for i in range(k)]  # in the middle of k equal parts
        for n, b, k in zip(size, block, counts, strict=True)
    ]
    return [(z, y, x, z + block[0], y + block[1], x + block[2]) for z, y, x in product(*starts)]


def _as_path(source: str | tuple[str, ...]) -> str | Sequence[str]:
    return source if isinstance(source, str) else list(source)


def _native_dtype(dtype: np.dtype, location: str) -> np.dtype:
    if dtype.kind not in "biuf":
        raise ValueError(f"{location}: voxels of type {dtype} are not supported; write bool, integers or real numbers")
    return dtype.newbyteorder("=")


def _check_channels(channels: Sequence[int] | int | None, count: int, location: str) -> tuple[int, ...]:
    if channels is None:
        return tuple(range(count))
    try:
        chosen = tuple(operator.index(c) for c in ([channels] if isinstance(channels, int) else channels))
    except TypeError:
        raise TypeError(f"channels={channels!r} must be a list of channel numbers") from None
    if not chosen or any(not 0 <= c < count for c in chosen):
        raise ValueError(f"{location}: channels={channels!r} is not there; choose from 0 to {count - 1}")
    return chosen


def _runs(channels: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Consecutive channels as (place in the result, count, first channel), so that each run is one read."""
    first = 0
    for i in range(1, len(channels) + 1):
        if i == len(channels) or channels[i] != channels[i - 1] + 1:
            yield first, i - first, channels[first]
            first = i
