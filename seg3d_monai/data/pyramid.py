"""Multiscale arrays as OME-Zarr 0.5 and 0.4 keep them: their levels, metadata, and how one level is made from another.

A level is written by the tile: a file of it, which is a shard (Zarr v3) or a chunk. Tiles are independent of each
other, so any number of threads or processes may make them, and a killed one's are made again. This file knows arrays of
voxels, (..., z, y, x), and neither where they come from nor in which order they are written.
https://ngff.openmicroscopy.org/0.5/
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from seg3d_monai.data.zarr_volume import UNFINISHED

OME_ZARR_VERSIONS = ("0.4", "0.5")
ATTRIBUTE = "seg3d_monai"
"""Under this key of the attributes lies what this package says of its own outputs."""
_COARSEST = 256  # levels are added until no axis is longer
_ZSTD_LEVEL = 3

Triple = tuple[int, int, int]
Downsample = Callable[[NDArray[Any], Triple], NDArray[Any]]


def pyramid_factors(shape: Triple, spacing_um: Sequence[float] | None) -> list[Triple]:
    """Downsampling factors (z, y, x) of the levels; an axis waits until the others have come near its spacing.

    Args:
        shape: (z, y, x) of level 0.
        spacing_um: (z, y, x) micrometres per voxel; None counts as isotropic.
    """
    spacing = (1.0, 1.0, 1.0) if spacing_um is None else tuple(spacing_um)
    levels: list[Triple] = [(1, 1, 1)]
    while True:
        factors = levels[-1]
        size = [-(-n // f) for n, f in zip(shape, factors, strict=True)]
        if max(size) <= _COARSEST:
            return levels
        now = [s * f for s, f in zip(spacing, factors, strict=True)]
        finest = min(v for v, n in zip(now, size, strict=True) if n > 1)
        z, y, x = (f * (2 if n > 1 and v < 2 * finest else 1) for f, n, v in zip(factors, size, now, strict=True))
        levels.append((z, y, x))


def level_shape(shape: Sequence[int], factors: Sequence[int]) -> Triple:
    """(z, y, x) of a level."""
    z, y, x = (-(-n // f) for n, f in zip(shape, factors, strict=True))
    return z, y, x


def create_level(
    root: zarr.Group,
    name: str,
    *,
    shape: Sequence[int],
    dtype: np.dtype[Any],
    axes: str,
    chunks: Triple,
    shards: Triple | None,
    version: str,
) -> None:
    """Make the array of a level, empty: every chunk holds zeros until it is written.

    Args:
        root: group to make it in.
        name: its path in the group.
        shape: (..., z, y, x).
        dtype: of the voxels.
        axes: one letter an axis: "zyx", "czyx", ....
        chunks: (z, y, x) of a chunk, cut to the shape; further axes have chunks of 1.
        shards: (z, y, x) of a file of several chunks, a multiple of theirs, or None.
        version: OME-Zarr version; 0.4 has no shards.
    """
    leading = (1,) * (len(shape) - 3)
    fitting = tuple(min(c, n) for c, n in zip(chunks, shape[-3:], strict=True))
    options: dict[str, Any] = {"shape": tuple(shape), "chunks": leading + fitting, "dtype": dtype, "fill_value": 0}
    if version == "0.4":
        options |= {
            "compressors": numcodecs.Zstd(level=_ZSTD_LEVEL),
            "chunk_key_encoding": {"name": "v2", "separator": "/"},
        }
    else:
        options |= {"compressors": ZstdCodec(level=_ZSTD_LEVEL), "dimension_names": list(axes)}
        if shards is not None and shards != chunks:
            # A level that is smaller than a shard is one.
            sizes = zip(shards, fitting, shape[-3:], strict=True)
            options["shards"] = leading + tuple(-(-min(s, n) // c) * c for s, c, n in sizes)
    root.create_array(name, **options)


def multiscale_metadata(
    name: str,
    *,
    axes: str,
    factors: Sequence[Triple],
    spacing_um: Sequence[float] | None,
    kind: str,
    version: str,
    origin: Sequence[int] = (0, 0, 0),
) -> dict[str, Any]:
    """The entry of `multiscales`; levels are the arrays "0", "1", ....

    Args:
        name: of the image.
        axes: letters out of t, c, z, y, x.
        factors: (z, y, x) of each level.
        spacing_um: (z, y, x) micrometres per voxel, or None: then the scale is in voxels, without a unit.
        kind: how the levels were made: "mean", "mode".
        version: OME-Zarr version.
        origin: (z, y, x) of the first voxel in the frame of a larger stack, voxels.
    """
    spacing = (1.0, 1.0, 1.0) if spacing_um is None else tuple(float(s) for s in spacing_um)
    extra = len(axes) - 3
    datasets = []
    for index, level in enumerate(factors):
        scale = [1.0] * extra + [s * f for s, f in zip(spacing, level, strict=True)]
        # A coarse voxel's centre lies between the centres of the voxels that it stands for.
        shift = [0.0] * extra + [s * (o + (f - 1) / 2) for s, f, o in zip(spacing, level, origin, strict=True)]
        transforms = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": shift}]
        datasets.append({"path": str(index), "coordinateTransformations": transforms})
    types = {"t": "time", "c": "channel"}
    unit = {} if spacing_um is None else {"unit": "micrometer"}
    described = [
        {"name": axis, "type": types[axis]} if axis in types else {"name": axis, "type": "space"} | unit
        for axis in axes
    ]
    return ({"version": version} if version == "0.4" else {}) | {
        "name": name,
        "axes": described,
        "datasets": datasets,
        "type": kind,
    }


def put_attributes(group: zarr.Group, version: str, ome: dict[str, Any], other: dict[str, Any] | None = None) -> None:
    """Set a group's attributes: OME-Zarr's where the version wants them, and others."""
    if version == "0.4":
        group.attrs.put((other or {}) | ome)
    else:
        group.attrs.put((other or {}) | {"ome": {"version": version} | ome})


def tile_shape(array: zarr.Array[Any]) -> tuple[int, ...]:
    """Voxels of a file of an array along each axis."""
    return tuple(array.shards or array.chunks)


def tile_grid(array: zarr.Array[Any]) -> list[int]:
    """Files of an array along each axis."""
    return [-(-n // e) for n, e in zip(array.shape, tile_shape(array), strict=True)]


def build_tile(fine: zarr.Array[Any], coarse: zarr.Array[Any], step: Triple, downsample: Downsample, tile: int) -> bool:
    """Make one tile of a level from the level before it.

    Args:
        fine: the level before, (..., z, y, x).
        coarse: the level.
        step: (z, y, x) voxels of `fine` per voxel of `coarse`, each 1 or 2.
        downsample: `downsample_labels` or `downsample_image`.
        tile: its number in the order of `tile_grid`.

    Returns:
        Whether the tile holds anything but zeros; only then is it written.
    """
    *leading, i, j, k = (int(n) for n in np.unravel_index(tile, tile_grid(coarse)))
    extent = tile_shape(coarse)[-3:]
    starts = [n * e for n, e in zip((i, j, k), extent, strict=True)]
    stops = [min(a + e, n) for a, e, n in zip(starts, extent, coarse.shape[-3:], strict=True)]
    voxels = np.zeros([b - a for a, b in zip(starts, stops, strict=True)], coarse.dtype)
    # Slab by slab: the finer voxels of a whole shard would be eight times as many. Those of a slab are one chunk deep,
    # so that a level with all axes halved takes no more memory than another.
    depth, height, width = coarse.chunks[-3:]
    slab = (max(1, depth // step[0]), height, width)
    lines = (range(a, b, c) for a, b, c in zip(starts, stops, slab, strict=True))
    for corner in product(*lines):
        ends = [min(a + c, b) for a, c, b in zip(corner, slab, stops, strict=True)]
        extents = zip(corner, ends, step, strict=True)
        source: tuple[int | slice, ...] = (*leading, *(slice(a * f, b * f) for a, b, f in extents))
        finer = np.asarray(fine[source])
        if finer.any():
            window = tuple(slice(a - o, b - o) for a, b, o in zip(corner, ends, starts, strict=True))
            voxels[window] = downsample(finer, step)
    if not voxels.any():
        return False
    target: tuple[int | slice, ...] = (*leading, *(slice(a, b) for a, b in zip(starts, stops, strict=True)))
    coarse[target] = voxels
    return True


def num_tiles(array: zarr.Array[Any]) -> int:
    """Files of an array."""
    return prod(tile_grid(array))


def downsample_labels(labels: NDArray[Any], step: Triple) -> NDArray[Any]:
    """The most frequent id of every cell of `step` voxels; ties go to an object, then to the lower id.

    Args:
        labels: [d, h, w]; an odd end is continued by its last voxel.
        step: (z, y, x), each 1 or 2.
    """
    cells = _cells(labels, step)
    most = cells[0].copy()
    is_mixed = np.zeros(most.shape, dtype=bool)
    for cell in cells[1:]:
        is_mixed |= cell != cells[0]
    votes = [cell[is_mixed] for cell in cells]  # few: most cells hold one id
    best, best_count = votes[0], np.zeros(votes[0].shape, dtype=np.uint8)
    for vote in votes:
        count = np.sum([vote == other for other in votes], axis=0, dtype=np.uint8)
        lower = (vote > 0) & ((best == 0) | (vote < best))
        better = (count > best_count) | ((count == best_count) & lower)
        best, best_count = np.where(better, vote, best), np.maximum(count, best_count)
    most[is_mixed] = best
    return most


def downsample_image(image: NDArray[Any], step: Triple) -> NDArray[Any]:
    """The mean of every cell of `step` voxels, in the image's dtype (integers rounded)."""
    mean = np.mean(_cells(image, step), axis=0, dtype=np.float64)
    return (mean if np.issubdtype(image.dtype, np.floating) else np.rint(mean)).astype(image.dtype)


def _cells(array: NDArray[Any], step: Triple) -> list[NDArray[Any]]:
    missing = [(0, -n % f) for n, f in zip(array.shape, step, strict=True)]
    padded = np.pad(array, missing, mode="edge") if np.any(missing) else array  # np.pad always copies
    return [padded[i :: step[0], j :: step[1], k :: step[2]] for i, j, k in product(*(range(f) for f in step))]


def remove_remains(folder: Path) -> None:
    """Remove the files that a killed process was writing; zarr gives a file its name once it is whole."""
    for path in folder.rglob("*.partial"):
        path.unlink()


def partial_path(output: Path) -> Path:
    """Where OUTPUT is built until it is complete."""
    return output.with_name(output.name + UNFINISHED)


def is_own_output(output: Path) -> bool:
    """Whether a folder is an OUTPUT that this package wrote (so `restart` may remove it)."""
    try:
        return ATTRIBUTE in zarr.open_group(output, mode="r").attrs
    except (FileNotFoundError, ValueError, OSError):
        return False
