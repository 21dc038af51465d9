"""What a conversion will write: the arrays of its levels, their files, and the boxes of the input that fill them.

The bytes of the output follow from the plan alone; how many files are filled from one read does not show in them. This
file knows shapes only: neither the input nor the disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np

from seg3d_monai.data.pyramid import OME_ZARR_VERSIONS, Triple, level_shape, pyramid_factors

DEFAULT_CHUNK: Triple = (64, 128, 128)
DEFAULT_SHARD: Triple = (64, 512, 512)
LABELS = "labels/instances"

Roi = tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class Unit:
    """Files of level 0 that are filled from one read of the input.

    Attributes:
        time: place of the time point in the output.
        box: (z1, y1, x1, z2, y2, x2) in voxels of the output.
        tiles: (z, y, x) places of the files on the grid of files.
    """

    time: int
    box: Roi
    tiles: tuple[Triple, ...]


@dataclass(frozen=True)
class ConvertPlan:
    """A conversion, checked.

    Attributes:
        shape: (z, y, x) of the output.
        num_channels: channels of the output; labels have one and no axis for it.
        times: numbers of the time points for a series, else None: then the output has no axis of time.
        dtype: name of the voxels' type.
        spacing_um: (z, y, x) micrometres per voxel, None when unknown.
        region: ROI of the input that is written.
        is_labels: the voxels are ids: coarser levels take the most frequent, not the mean.
        version: of OME-Zarr.
        chunks: (z, y, x) of a chunk.
        shards: (z, y, x) of a file, a multiple of the chunks; None for a file a chunk.
    """

    shape: Triple
    num_channels: int
    times: tuple[int, ...] | None
    dtype: str
    spacing_um: tuple[float, float, float] | None
    region: Roi
    is_labels: bool
    version: str
    chunks: Triple
    shards: Triple | None

    @property
    def folder(self) -> str:
        """The group of the levels, "" for the root."""
        return LABELS if self.is_labels else ""

    @property
    def axes(self) -> str:
        """Of every level's array."""
        return ("t" if self.times is not None else "") + ("" if self.is_labels else "c") + "zyx"

    @property
    def factors(self) -> list[Triple]:
        """Downsampling factors of the levels."""
        return pyramid_factors(self.shape, self.spacing_um)

    def array_name(self, level: int) -> str:
        """Path of a level's array in the output."""
        return f"{self.folder}/{level}".lstrip("/")

    def array_shape(self, level: int) -> tuple[int, ...]:
        """Shape of a level's array."""
        leading = (() if self.times is None else (len(self.times),)) + (() if self.is_labels else (self.num_channels,))
        return (*leading, *level_shape(self.shape, self.factors[level]))

    def leading(self, time: int, channel: int) -> tuple[int, ...]:
        """Index of a time point and channel in the axes before z, y, x."""
        return (() if self.times is None else (time,)) + (() if self.is_labels else (channel,))

    @property
    def tile(self) -> Triple:
        """(z, y, x) of a file of level 0; it may reach beyond the shape."""
        chunks = [min(c, n) for c, n in zip(self.chunks, self.shape, strict=True)]
        if self.shards is None:
            return chunks[0], chunks[1], chunks[2]
        z, y, x = (-(-min(s, n) // c) * c for s, c, n in zip(self.shards, chunks, self.shape, strict=True))
        return z, y, x

    def facts(self) -> dict[str, Any]:
        """What the output says of how it was made, as JSON gives it back."""
        chosen: dict[str, Any] = {
            "labels": self.is_labels,
            "roi": list(self.region),
            "spacing_um": None if self.spacing_um is None else list(self.spacing_um),
            "ome_zarr_version": self.version,
            "chunk_size": list(self.chunks),
            "shard_size": None if self.shards is None else list(self.shards),
        }
        return chosen | ({} if self.times is None else {"times": list(self.times)})


def read_sizes(
    chunk_size: int | Sequence[int] | None, shard_size: int | Sequence[int] | None, version: str
) -> tuple[Triple, Triple | None]:
    """Checked extents of chunks and files.

    Args:
        chunk_size: int or (z, y, x) voxels of a chunk; None for `DEFAULT_CHUNK`.
        shard_size: int or (z, y, x) voxels of a file; None for the multiple of the chunk next to `DEFAULT_SHARD`, 0 for
            a file a chunk.
        version: OME-Zarr version.

    Raises:
        ValueError: a number is out of its range, shards are no multiple of chunks, or the version has none.
        TypeError: a number is no integer.
    """
    if version not in OME_ZARR_VERSIONS:
        raise ValueError(f"ome_zarr_version is {version!r}; choose one of {', '.join(OME_ZARR_VERSIONS)}")
    chunks = _triple("chunk_size", DEFAULT_CHUNK if chunk_size is None else chunk_size)
    if shard_size == 0:
        return chunks, None
    if shard_size is None:
        z, y, x = (max(1, s // c) * c for s, c in zip(DEFAULT_SHARD, chunks, strict=True))
        return chunks, None if version == "0.4" else (z, y, x)
    if version == "0.4":
        raise ValueError("shard_size describes files of several chunks, which OME-Zarr 0.4 has not; leave it out")
    shards = _triple("shard_size", shard_size)
    if any(s % c for s, c in zip(shards, chunks, strict=True)):
        raise ValueError(f"shard_size is {shards}, which chunks of {chunks} do not fill; pass a multiple of chunk_size")
    return chunks, shards


def unit_shape(plan: ConvertPlan, source_chunk: Triple, num_channels: int, max_bytes: int) -> Triple:
    """(z, y, x) of the box that is read at once: whole files, and whole pieces of the input as far as memory goes.

    A page that is compressed as one piece is decoded for every box that touches it, so a box spans pages.

    Args:
        plan: the conversion.
        source_chunk: (z, y, x) of a stored piece of the input.
        num_channels: channels that are read together.
        max_bytes: of a box; a single file may take more.
    """
    size = list(plan.tile)
    voxel = np.dtype(plan.dtype).itemsize * num_channels
    for axis in (2, 1, 0):
        if source_chunk[axis] > plan.tile[axis]:
            others = prod(size) // size[axis] * voxel
            wanted = -(-min(source_chunk[axis], plan.shape[axis]) // plan.tile[axis]) * plan.tile[axis]
            size[axis] = max(plan.tile[axis], min(wanted, max_bytes // others // plan.tile[axis] * plan.tile[axis]))
    return size[0], size[1], size[2]


def units(plan: ConvertPlan, size: Triple) -> Iterator[Unit]:
    """The boxes that tile the output, time by time in raster order.

    Args:
        plan: the conversion.
        size: from `unit_shape`.
    """
    for time in range(1 if plan.times is None else len(plan.times)):
        for corner in product(*(range(0, n, s) for n, s in zip(plan.shape, size, strict=True))):
            ends = [min(a + s, n) for a, s, n in zip(corner, size, plan.shape, strict=True)]
            places = product(*(range(a // t, -(-b // t)) for a, b, t in zip(corner, ends, plan.tile, strict=True)))
            yield Unit(time, (*corner, *ends), tuple(places))  # type: ignore[arg-type]


def num_units(plan: ConvertPlan, size: Triple) -> int:
    """How many boxes `units` gives."""
    times = 1 if plan.times is None else len(plan.times)
    return times * prod(-(-n // s) for n, s in zip(plan.shape, size, strict=True))


def tile_box(plan: ConvertPlan, place: Triple) -> Roi:
    """The voxels of a file of level 0."""
    low = [i * t for i, t in zip(place, plan.tile, strict=True)]
    z, y, x = (min(a + t, n) for a, t, n in zip(low, plan.tile, plan.shape, strict=True))
    return low[0], low[1], low[2], z, y, x


def times_decoded(plan: ConvertPlan, source_chunk: Triple, size: Triple) -> float:
    """How often a stored piece of the input is read, on average."""
    result = 1.0
    for start, n, piece, step in zip(plan.region[:3], plan.shape, source_chunk, size, strict=True):
        edges = range(start, start + n, step)
        touched = sum(-(-min(a + step, start + n) // piece) - a // piece for a in edges)
        result *= touched / (-(-(start + n) // piece) - start // piece)
    return result


def _triple(name: str, value: int | Sequence[int]) -> Triple:
    values = [value] * 3 if isinstance(value, int) else list(value)
    if len(values) != 3:
        raise ValueError(f"{name} has {len(values)} values: {values}; pass one integer or three (z, y, x)")
    for v in values:
        if isinstance(v, bool) or not hasattr(v, "__index__"):
            raise TypeError(f"{name} holds {v!r}; pass integers (z, y, x) in voxels")
        if v < 1:
            raise ValueError(f"{name} is {values}; every value must be at least 1")
    return int(values[0]), int(values[1]), int(values[2])
