"""A stack as it is viewed: its levels, where their voxels lie, its channels and time points; read through a cache.

*Factor* of a level: how many voxels of full resolution one of its voxels stands for, along each axis. Voxel i of a
level has its centre at (i + 1/2) * factor - 1/2 voxels of full resolution, as in levels made of means or votes. It must
not know layers or napari.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock

import numpy as np

from seg3d_monai.data.stored_array import find_level
from seg3d_monai.data.volume import Roi, Spacing, StoredVolume, Volume, open_volume
from seg3d_monai.data.volume_cache import VolumeCache

CACHE_BYTES = 2**28
Floats = tuple[float, float, float]
Triple = tuple[int, int, int]
AnyPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Level:
    """One level of a stack.

    shape: (z, y, x).
    factor: (z, y, x) voxels of full resolution per voxel.
    """

    shape: Triple
    factor: Floats


class Stack:
    """Levels, channels and time points of one stack.

    Args:
        levels: finest first.
        dtype: of its voxels.
        spacing_um: (z, y, x) micrometres per voxel of full resolution, None when unknown.
        channels: numbers of its channels.
        num_times: time points that are stored.
        open_part: (level, channel, time) -> a volume, and which of its channels is meant.
        find: from a level as `open_volume` takes it to its number.
    """

    def __init__(
        self,
        *,
        levels: Sequence[Level],
        dtype: np.dtype,
        spacing_um: Spacing | None,
        channels: Sequence[int],
        num_times: int,
        open_part: Callable[[int, int, int], tuple[Volume, int]],
        find: Callable[[int | str], int],
    ) -> None:
        self.levels = tuple(levels)
        self.dtype = dtype
        self.spacing_um = spacing_um
        self.channels = tuple(channels)
        self.num_times = num_times
        self.find_level = find
        self._open_part = open_part
        self._cache = VolumeCache(max_bytes=CACHE_BYTES)
        self._lock = Lock()

    def read(self, level: int, channel: int, time: int, roi: Roi) -> np.ndarray:
        """Voxels [z, y, x] of a region, in voxels of the level.

        Raises:
            ValueError: the data are damaged.
        """
        with self._lock:
            volume, index = self._open_part(level, channel, time)
            key = (level, time, None if volume.shape[0] > 1 else channel)
            return self._cache.read(key, lambda: volume, roi)[index]


def open_stack(
    source: AnyPath | Volume | Sequence[Volume],
    *,
    axes: str | None = None,
    channels: Sequence[int] | int | None = None,
) -> Stack:
    """Open every level of a stack; voxels are not read.

    Args:
        source: a path as `open_volume` takes it; a volume; or the volumes of all levels, finest first.
        axes: order of the stored axes.
        channels: channels to keep; None keeps all.

    Raises:
        FileNotFoundError, ValueError, TypeError, ImportError, OSError: as `open_volume` does.
    """
    if isinstance(source, str | os.PathLike):
        return _stored_stack(source, axes, channels)
    volumes = [source] if isinstance(source, Volume) else list(source)
    kept = range(volumes[0].shape[0]) if channels is None else [channels] if isinstance(channels, int) else channels

    def find(level: int | str) -> int:
        number = int(level)
        if not 0 <= number < len(volumes):
            raise ValueError(f"level={level!r} is not there; choose 0 to {len(volumes) - 1}")
        return number

    return Stack(
        levels=_levels([volume.shape[1:] for volume in volumes], [_known(volume.spacing_um) for volume in volumes]),
        dtype=volumes[0].dtype,
        spacing_um=volumes[0].spacing_um,
        channels=list(kept),
        num_times=1,
        open_part=lambda level, channel, time: (volumes[level], channel),
        find=find,
    )


def _stored_stack(path: AnyPath, axes: str | None, channels: Sequence[int] | int | None) -> Stack:
    finest = open_volume(path, axes=axes, channels=channels)
    assert isinstance(finest, StoredVolume)
    volumes = [
        finest,
        *(open_volume(path, axes=axes, channels=channels, level=i) for i in range(1, len(finest.levels))),
    ]
    spacings = [tuple(level.spacing_um.get(axis) for axis in "ZYX") for level in finest.levels]
    every = range(finest.num_channels)
    kept = every if channels is None else [channels] if isinstance(channels, int) else channels
    opened: dict[tuple[int, int, int], Volume] = {}

    def open_part(level: int, channel: int, time: int) -> tuple[Volume, int]:
        name = (level, channel, time)
        if name not in opened:
            opened[name] = open_volume(path, axes=axes, channels=channel, time=time, level=level)
        return opened[name], 0

    return Stack(
        levels=_levels([volume.shape[1:] for volume in volumes], spacings),
        dtype=finest.dtype,
        spacing_um=finest.spacing_um,
        channels=list(kept),
        num_times=finest.num_times,
        open_part=open_part,
        find=partial(find_level, levels=finest.levels, location=str(path)),
    )


def _known(spacing: Spacing | None) -> tuple[float | None, ...]:
    return (None, None, None) if spacing is None else spacing


def _levels(shapes: Sequence[Sequence[int]], spacings: Sequence[Sequence[float | None]]) -> list[Level]:
    levels = []
    for shape, spacing in zip(shapes, spacings, strict=True):
        z, y, x = (
            level_factor(fine, coarse, fine_um, coarse_um)
            for fine, coarse, fine_um, coarse_um in zip(shapes[0], shape, spacings[0], spacing, strict=True)
        )
        levels.append(Level((shape[0], shape[1], shape[2]), (z, y, x)))
    return levels


def level_factor(fine: int, coarse: int, fine_um: float | None, coarse_um: float | None) -> float:
    """Voxels of full resolution per voxel of a level, along one axis.

    Args:
        fine: extent at full resolution.
        coarse: extent of the level; a rest at the end makes a voxel of its own, or is left out.
        fine_um: voxel size at full resolution, None where the file does not say.
        coarse_um: voxel size of the level.
    """
    ratio = coarse_um / fine_um if fine_um and coarse_um else fine / coarse
    whole = max(1, round(ratio))
    # Files whose sizes follow from the extents, 5 / 3 voxels, mean a whole number of voxels.
    return float(whole) if coarse in (-(-fine // whole), max(1, fine // whole)) else float(ratio)
