"""Measurements of a finished OUTPUT: shape, intensity and atlas region of every object, in one pass over the stack.

Labels, image and atlas are read block by block (about `_BLOCK_SIZE`, in whole chunks of the labels). Memory holds one
block and a few hundred bytes per object, whatever the size of the stack.

Everything that is counted (voxels, coordinates, neighbours, intensities of at most 16 bits) is summed in integers, so
the table has the same bits for every block size. Other intensities are summed in float64, block after block in raster
order, and their variances joined by the formula of Chan, Golub and LeVeque (The American Statistician 37, 1983); there
another block size may change the last digits.

Surface areas follow Crofton's formula on the 13 directions to the neighbours of a voxel, each weighted by its Voronoi
cell on the sphere of directions (Legland, Kiêu and Devaux, Image Analysis & Stereology 26, 2007). The directions take
the voxel size into account, and the formula needs nothing but pairs of neighbours, which do not mind block faces.

This file knows volumes and tables; it must not know how the labels were made.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import SphericalVoronoi
from tqdm import tqdm

from seg3d_monai.data.intensity import check_block
from seg3d_monai.data.targets import compact_labels
from seg3d_monai.data.volume import Volume, check_spacing, open_volume
from seg3d_monai.inference.blocks import BlockPlan, Roi, Triple
from seg3d_monai.inference.regions import Regions, check_labels, find_runs, open_atlas
from seg3d_monai.inference.table import FORMATS, write_table
from seg3d_monai.inference.writer import LABELS

_ROWS = 1_000_000  # of a row group
_BLOCK_SIZE = (64, 256, 256)
_PENDING_ROWS = 100_000  # rows of single blocks that wait until they are merged
_SPACING_TOLERANCE = 1e-3  # relative; files round the voxel size
_FLAT = 1e-12  # principal variances that are smaller, relative to the largest, are rounding errors

_STEPS = [step for step in product((-1, 0, 1), repeat=3) if step > (0, 0, 0)]
# Steps that are mirror images have the same length and weight, so they are counted together.
_STEP_KINDS = sorted({(abs(z), abs(y), abs(x)) for z, y, x in _STEPS})
_AXIS_PAIRS = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))

_Integers = NDArray[np.int64]
_Floats = NDArray[np.float64]


def measure_objects(
    output: str | os.PathLike[str],
    image: str | os.PathLike[str] | Volume,
    *,
    table: str | os.PathLike[str] | None = None,
    atlas: str | os.PathLike[str] | Volume | None = None,
    axes: str | None = None,
    spacing: Sequence[float] | None = None,
    channels: Sequence[int] | int | None = None,
    time: int = 0,
    level: int = 0,
    atlas_spacing: Sequence[float] | None = None,
    progress: bool = True,
) -> Path:
    """Measure every object of a segmented stack.

    Columns of the table, one row per object by ascending id (micrometre columns, sphericity and elongation are null
    where the voxel size is unknown):

    - `id`, `volume_voxels`, `volume_um3`
    - `equivalent_diameter_um`: of the ball of that volume.
    - `surface_area_um2`: by Crofton's formula in 13 directions. A ball of many voxels comes out right; a flat face is
      off by -7 to 2 % on cubic voxels, -20 to 10 % on voxels four times as deep as wide; an object of a few voxels is
      underestimated, which gives a sphericity above 1. The end of the stack is a surface too.
    - `sphericity`: surface of the ball of that volume / surface_area_um2.
    - `axis_major_length_um`, `axis_intermediate_length_um`, `axis_minor_length_um`: full axes of the ellipsoid with the
      same second moments of voxel centres (scikit-image's `axis_major_length`); 0 for an object one voxel thin.
    - `elongation`: major / intermediate axis, at least 1 (ITK's definition); null where the latter is 0.
    - `intensity_mean_cN`, `intensity_std_cN` (population), `intensity_min_cN`, `intensity_max_cN`, `intensity_sum_cN`
      for each channel N as the image counts them: raw voxels; minimum, maximum and sum are int64 for images of at most
      16 bits and float64 for others.
    - with an atlas `region`: the atlas id that most of its voxels lie in (0 is outside of all regions), of equals the
      lowest, and `region_share`: the part of its voxels that do, in (0, 1].

    Args:
        output: OME-Zarr that `predict_volume` wrote, or any label volume (0 background). Ids may have gaps.
        image: path of the stack that was segmented or of another image of the same shape, or an open volume.
        table: file to write, `*.parquet` or `*.csv`, replaced if it exists; None is X.measurements.parquet beside
            OUTPUT X.zarr.
        atlas: label volume of regions, path or open volume, with a shape and voxel size of its own. Its first corner is
            the labels' first corner; a voxel has the region of the atlas voxel that its centre lies in.
        axes: axes of the stored image, if its metadata do not say; like channels and level for a path only.
        spacing: (z, y, x) micrometre per voxel; overrides that of labels and image.
        channels: channels to measure; None measures all.
        time: time point of the image, and of OUTPUT if that is a series too. If it is a series of some time points of
            the image only, pass an open volume of the image, and here the place in OUTPUT.
        level: level of a multiscale image.
        atlas_spacing: (z, y, x) micrometre per voxel of the atlas; overrides its metadata.
        progress: show a progress bar.

    Returns:
        The path of the table. The file is written whole or not at all.

    Raises:
        FileNotFoundError: if OUTPUT, the image, the atlas or the table's folder does not exist.
        ValueError: if labels and image differ in shape or voxel size, a block of the image with objects in it holds NaN
            or infinity, the atlas does not cover the labels or its voxel size is unknown, a dtype is not the expected
            one, or an option does not fit.
        TypeError: if an option has the wrong type.
    """
    path = _table_path(Path(output), table)
    labels = _open_labels(Path(output), time)
    volume = _open_image(image, labels, axes=axes, channels=channels, time=time, level=level)
    numbers = _channel_numbers(volume, channels)
    _check_shape(labels, volume)
    voxel_um = _common_spacing(labels, volume, spacing)
    if atlas is None and atlas_spacing is not None:
        raise ValueError(f"atlas_spacing is given without atlas: {atlas_spacing!r}; pass the atlas too")
    regions = None if atlas is None else Regions(open_atlas(atlas), atlas_spacing, labels, voxel_um)

    pending: list[_Objects] = [_Objects.empty(len(numbers), volume.dtype)]
    blocks = BlockPlan.make(shape=labels.shape[1:], block_size=_block_size(labels.chunk_shape), halo=1)
    for block in tqdm(blocks, total=len(blocks), desc="measure", unit="block", disable=not progress):
        roi = block.owned
        codes, ids = _read_codes(labels, roi)
        if len(ids) == 0:
            continue
        pending.append(_measure_block(codes, ids, roi, volume))
        if sum(len(part.ids) for part in pending[1:]) > 2 * len(pending[0].ids) + _PENDING_ROWS:
            pending = [_merge(pending)]
        if regions is not None:
            regions.add(codes[:-1, :-1, :-1], ids, roi)
    objects = _merge(pending)
    columns: dict[str, NDArray] = {"id": objects.ids, **_shape_columns(objects, voxel_um)}
    columns |= _intensity_columns(objects, numbers)
    if regions is not None:
        columns |= regions.columns(objects.voxels)
    rows = pd.DataFrame(columns)
    write_table((rows[start : start + _ROWS] for start in range(0, max(1, len(rows)), _ROWS)), path)
    return path


@dataclass(frozen=True)
class _Objects:
    """Sums over the voxels of N objects, in a block or in all of them so far.

    Attributes:
        ids: [N], ascending.
        voxels: [N].
        first: [N, 3], sums of the coordinates z, y, x, in voxels of the volume.
        second: [N, 6], sums of the products in `_AXIS_PAIRS`, modulo 2**64.
        neighbours: [N, 7], pairs of voxels of the same object, one of `_STEP_KINDS` apart.
        total: [N, C], sums of intensity; int64 where they are exact, else float64.
        squares: [N, C], sums of squared intensity (int64), or of squared deviations from the mean (float64).
        lowest: [N, C].
        highest: [N, C].
    """

    ids: _Integers
    voxels: _Integers
    first: _Integers
    second: _Integers
    neighbours: _Integers
    total: NDArray
    squares: NDArray
    lowest: NDArray
    highest: NDArray

    @classmethod
    def empty(cls, num_channels: int, dtype: np.dtype) -> _Objects:
        first, second, neighbours = (np.zeros((0, n), np.int64) for n in (3, len(_AXIS_PAIRS), len(_STEP_KINDS)))
        total = np.zeros((0, num_channels), _sum_dtype(dtype))
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64), first, second, neighbours, total, total, total, total)


def _sum_dtype(dtype: np.dtype) -> type[np.int64] | type[np.float64]:
    # The squares of 16 bits leave room for 2**31 voxels an object.
    return np.int64 if dtype.kind in "bui" and dtype.itemsize <= 2 else np.float64


def _read_codes(labels: Volume, roi: Roi) -> tuple[NDArray[np.int32], _Integers]:
    """The objects of a ROI and of one more voxel at its upper faces, background beyond the volume's end."""
    stop = [min(end + 1, extent) for end, extent in zip(roi[3:], labels.shape[1:], strict=True)]
    block = labels.read((*roi[:3], *stop))[0]
    codes, ids = compact_labels(block, ignore=None if block.dtype == bool else int(np.iinfo(block.dtype).max))
    beyond = [(0, end + 1 - last) for end, last in zip(roi[3:], stop, strict=True)]
    return np.pad(np.maximum(codes, 0), beyond), ids


def _measure_block(codes: NDArray[np.int32], ids: _Integers, roi: Roi, image: Volume) -> _Objects:
    """Sums over the objects of a block; `codes` reaches one voxel beyond its upper faces."""
    neighbours = _count_neighbours(codes, len(ids))
    owned = codes[:-1, :-1, :-1]
    starts, lengths = find_runs(owned)
    run_codes = owned.reshape(-1)[starts]
    length = lengths.astype(np.int64)
    z, y, x = (place + low for place, low in zip(np.unravel_index(starts, owned.shape), roi[:3], strict=True))
    along = length * x + length * (length - 1) // 2
    along_squared = x * (2 * along - length * x) + (length - 1) * length * (2 * length - 1) // 6
    first = (length * z, length * y, along)
    second = (first[0] * z, first[1] * y, along_squared, first[0] * y, along * z, along * y)

    def summed(values: NDArray) -> NDArray:
        result = np.zeros(len(ids) + 1, values.dtype)
        np.add.at(result, run_codes, values)
        return result

    def columns(values: Sequence[NDArray]) -> NDArray:
        return np.stack(values, axis=1)[1:]  # without the background

    voxels = summed(length)
    block = image.read(roi)
    check_block(block, roi, image.path)
    total, squares, lowest, highest = [], [], [], []
    for channel in block:
        values = channel.reshape(-1).astype(_sum_dtype(channel.dtype))
        sums = summed(np.add.reduceat(values, starts))
        is_float = values.dtype.kind == "f"
        # The start must be neutral: an object may have no voxel here but in the margin.
        limits = (-np.inf, np.inf) if is_float else (np.iinfo(np.int64).min, np.iinfo(np.int64).max)
        high, low = (np.full_like(sums, limit) for limit in limits)
        np.minimum.at(low, run_codes, np.minimum.reduceat(values, starts))
        np.maximum.at(high, run_codes, np.maximum.reduceat(values, starts))
        if is_float:
            means = np.divide(sums, voxels, out=np.zeros_like(sums), where=voxels > 0)
            values -= np.repeat(means[run_codes], lengths)
        total.append(sums)
        squares.append(summed(np.add.reduceat(values * values, starts)))
        lowest.append(low)
        highest.append(high)
    return _Objects(
        ids=ids,
        voxels=voxels[1:],
        first=columns([summed(values) for values in first]),
        second=columns([summed(values) for values in second]),
        neighbours=neighbours,
        total=columns(total),
        squares=columns(squares),
        lowest=columns(lowest),
        highest=columns(highest),
    )


def _count_neighbours(codes: NDArray[np.int32], num_objects: int) -> _Integers:
    """[num_objects, 7]: pairs of voxels of one object, by `_STEP_KINDS`.

    A pair belongs to the block that owns the lowest corner of the pair's bounding box, so the blocks of a volume count
    every pair once.
    """
    counts = np.zeros((num_objects, len(_STEP_KINDS)), np.int64)
    for step in _STEPS:
        near = codes[tuple(slice(1, None) if s < 0 else slice(-1) for s in step)]
        far = codes[tuple(slice(1, None) if s > 0 else slice(-1) for s in step)]
        same = near[(near == far) & (near > 0)]
        kind = _STEP_KINDS.index((abs(step[0]), abs(step[1]), abs(step[2])))
        counts[:, kind] += np.bincount(same, minlength=num_objects + 1)[1:]
    return counts


def _merge(parts: Sequence[_Objects]) -> _Objects:
    """Join sums over disjoint sets of voxels."""
    ids = np.concatenate([part.ids for part in parts])
    if len(ids) == 0:
        return parts[0]
    order = np.argsort(ids, kind="stable")
    unique, starts, group = np.unique(ids[order], return_index=True, return_inverse=True)

    def rows(name: str) -> NDArray:
        return np.concatenate([getattr(part, name) for part in parts])[order]

    def added(values: NDArray) -> NDArray:
        return np.add.reduceat(values, starts, axis=0)

    voxels, total, squares = rows("voxels"), rows("total"), rows("squares")
    if total.dtype.kind == "f":
        part_means = total / np.maximum(voxels, 1)[:, None]
        means = added(total) / np.maximum(added(voxels), 1)[:, None]
        squares = squares + voxels[:, None] * (part_means - means[group]) ** 2
    return _Objects(
        ids=unique,
        voxels=added(voxels),
        first=added(rows("first")),
        second=added(rows("second")),
        neighbours=added(rows("neighbours")),
        total=added(total),
        squares=added(squares),
        lowest=np.minimum.reduceat(rows("lowest"), starts, axis=0),
        highest=np.maximum.reduceat(rows("highest"), starts, axis=0),
    )


def _shape_columns(objects: _Objects, spacing_um: Sequence[float] | None) -> dict[str, NDArray]:
    spacing = np.asarray((1.0, 1.0, 1.0) if spacing_um is None else spacing_um)
    volume = objects.voxels * spacing.prod()
    diameter = np.cbrt(6 / np.pi * volume)
    surface = _surface_area(objects, spacing)
    lengths = _axis_lengths(objects, spacing)
    major, intermediate, minor = lengths.T
    columns = {
        "volume_um3": volume,
        "equivalent_diameter_um": diameter,
        "surface_area_um2": surface,
        "sphericity": np.pi * diameter**2 / surface,
        "axis_major_length_um": major,
        "axis_intermediate_length_um": intermediate,
        "axis_minor_length_um": minor,
        "elongation": np.divide(major, intermediate, out=np.full_like(major, np.nan), where=intermediate > 0),
    }
    known = np.nan if spacing_um is None else 1.0
    return {"volume_voxels": objects.voxels} | {name: values * known for name, values in columns.items()}


def _surface_area(objects: _Objects, spacing: _Floats) -> _Floats:
    """Twice the mean, over all directions, of the area of a projection times how often its lines cross the surface."""
    steps = np.array([step for step in product((-1, 0, 1), repeat=3) if any(step)])
    lengths = np.linalg.norm(steps * spacing, axis=1)
    shares = SphericalVoronoi(steps * spacing / lengths[:, None]).calculate_areas() / (4 * np.pi)
    surface = np.zeros(len(objects.ids))
    for kind, same in zip(_STEP_KINDS, objects.neighbours.T, strict=True):
        of_kind = (np.abs(steps) == kind).all(axis=1)
        # Each line of voxels stands for voxel volume / step of the plane across it; a voxel whose neighbour is not of
        # its object is a crossing. Steps and their opposites are the same lines, met from either end.
        crossings = of_kind.sum() * objects.voxels - 2 * same
        surface += 2 * shares[of_kind].mean() * 2 * crossings * spacing.prod() / lengths[of_kind].mean()
    return surface


def _axis_lengths(objects: _Objects, spacing: _Floats) -> _Floats:
    """[N, 3], descending; a solid ellipsoid of full axis L has the variance L**2 / 20 along it."""
    covariance = np.zeros((len(objects.ids), 3, 3))
    for (a, b), products in zip(_AXIS_PAIRS, objects.second.T, strict=True):
        central = _central_products(objects.voxels, objects.first[:, a], objects.first[:, b], products)
        covariance[:, a, b] = covariance[:, b, a] = central / objects.voxels * spacing[a] * spacing[b]
    variances = np.linalg.eigvalsh(covariance)[:, ::-1]
    variances = np.where(variances > _FLAT * variances[:, :1], variances, 0)
    return np.sqrt(20 * variances)


def _central_products(count: _Integers, sum_a: _Integers, sum_b: _Integers, products: _Integers) -> _Floats:
    """Sums of (a - mean a) * (b - mean b) from sums of a, b and a * b.

    They are shifted to the integers below the means first. That is exact even where `products` has gone round 2**64,
    since the shifted sum is small.
    """
    low_a, low_b = sum_a // count, sum_b // count
    shifted = products - low_a * sum_b - low_b * sum_a + count * low_a * low_b
    return shifted - (sum_a - count * low_a).astype(np.float64) * (sum_b - count * low_b) / count


def _intensity_columns(objects: _Objects, channels: Sequence[int]) -> dict[str, NDArray]:
    columns: dict[str, NDArray] = {}
    for channel, total, squares, lowest, highest in zip(
        channels, objects.total.T, objects.squares.T, objects.lowest.T, objects.highest.T, strict=True
    ):
        if total.dtype.kind == "i":
            squares = _central_products(objects.voxels, total, total, squares)
        columns |= {
            f"intensity_mean_c{channel}": total / objects.voxels,
            f"intensity_std_c{channel}": np.sqrt(squares / objects.voxels),
            f"intensity_min_c{channel}": lowest,
            f"intensity_max_c{channel}": highest,
            f"intensity_sum_c{channel}": total,
        }
    return columns


def _table_path(output: Path, table: str | os.PathLike[str] | None) -> Path:
    path = output.with_suffix(".measurements.parquet") if table is None else Path(table)
    if path.suffix.removeprefix(".") not in FORMATS:
        raise ValueError(f"table is {str(path)!r}; give a name that ends with .{' or .'.join(FORMATS)}")
    if path.resolve() == output.with_suffix(f".instances{path.suffix}").resolve():
        raise ValueError(f"table is {str(path)!r}, the object table of seg3d predict; give another name")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder of table {path} does not exist; make {path.parent} first")
    return path


def _open_labels(output: Path, time: int) -> Volume:
    if not output.exists():
        raise FileNotFoundError(f"output {output} does not exist; seg3d predict writes it when it has finished")
    inside = output / LABELS  # named, because OUTPUT may hold a copy of the image too
    path = inside if inside.is_dir() else output
    labels = open_volume(path)
    if _num_times(labels) > 1:
        labels = open_volume(path, time=time)
    check_labels("output", labels, "give what seg3d predict wrote, or a label volume")
    return labels


def _num_times(volume: Volume) -> int:
    return getattr(volume, "num_times", 1)


def _open_image(
    image: str | os.PathLike[str] | Volume,
    labels: Volume,
    *,
    axes: str | None,
    channels: Sequence[int] | int | None,
    time: int,
    level: int,
) -> Volume:
    is_series = _num_times(labels) > 1
    if isinstance(image, Volume):
        if (axes, channels, level) != (None, None, 0) or (time != 0 and not is_series):
            raise ValueError("axes, channels, time and level describe a file; open the volume with them instead")
        return image
    volume = open_volume(image, axes=axes, channels=channels, time=time, level=level)
    if is_series and _num_times(volume) != _num_times(labels):
        raise ValueError(
            f"the labels {labels.path} have {_num_times(labels)} time points and the image {volume.path} has "
            f"{_num_times(volume)}; open the image at the time point that belongs to time={time} and pass the volume"
        )
    return volume


def _channel_numbers(volume: Volume, channels: Sequence[int] | int | None) -> list[int]:
    """What the columns call the channels: their numbers in the file."""
    if channels is None:
        return list(range(volume.shape[0]))
    numbers = [channels] if isinstance(channels, int) else [int(channel) for channel in channels]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"channels is {numbers}; name each channel once")
    return numbers


def _check_shape(labels: Volume, image: Volume) -> None:
    if labels.shape[1:] != image.shape[1:]:
        raise ValueError(
            f"the labels {labels.path} have shape (z, y, x) = {labels.shape[1:]} and the image {image.path or ''} has "
            f"{image.shape[1:]} and {image.shape[0]} channel(s); give the image that was segmented, with the axes "
            "(--axes) and level that it was read with"
        )


def _common_spacing(labels: Volume, image: Volume, spacing: Sequence[float] | None) -> Sequence[float] | None:
    if spacing is not None:
        return check_spacing(spacing)
    if labels.spacing_um is None or image.spacing_um is None:
        known = labels.spacing_um or image.spacing_um
        if known is None:
            warnings.warn(
                "the voxel spacing is unknown: measurements that need it are null; pass spacing (z, y, x) to set it",
                stacklevel=3,
            )
        return known
    if not np.allclose(labels.spacing_um, image.spacing_um, rtol=_SPACING_TOLERANCE, atol=0):
        raise ValueError(
            f"the labels {labels.path} have spacing (z, y, x) = {labels.spacing_um} um and the image "
            f"{image.path or ''} has {image.spacing_um} um; give the image that was segmented, or say which is right "
            "with spacing (--spacing)"
        )
    return labels.spacing_um


def _block_size(chunk_shape: Sequence[int]) -> Triple:
    """About `_BLOCK_SIZE`, in whole chunks where they are no larger."""
    z, y, x = (
        limit // chunk * chunk if chunk <= limit else limit
        for chunk, limit in zip(chunk_shape, _BLOCK_SIZE, strict=True)
    )
    return z, y, x
