"""Measurements of a finished OUTPUT: shape, intensity and atlas region of every object, in one pass over the stack.

Labels, image and atlas are read block by block (about `_BLOCK_SIZE`, in whole chunks of the labels). Memory holds one
block and a few hundred bytes per object, whatever the size of the stack. What is summed is in object_sums.py, what is
made of it in object_columns.py.

This file knows volumes and tables; it must not know how the labels were made.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from seg3d_monai.data.targets import compact_labels
from seg3d_monai.data.volume import Volume, check_spacing, open_volume
from seg3d_monai.inference.blocks import BlockPlan, Roi, Triple
from seg3d_monai.inference.object_columns import intensity_columns, shape_columns
from seg3d_monai.inference.object_sums import Integers, ObjectSums, join_sums, sum_block
from seg3d_monai.inference.regions import Regions, check_labels, open_atlas
from seg3d_monai.inference.table import FORMATS, write_table
from seg3d_monai.inference.writer import LABELS

_ROWS = 1_000_000  # of a row group
_BLOCK_SIZE = (64, 256, 256)
_PENDING_ROWS = 100_000  # rows of single blocks that wait until they are merged
_SPACING_TOLERANCE = 1e-3  # relative; files round the voxel size


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
    level: int | str = 0,
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
        level: level of a multiscale image: its number, name or voxel size, as `open_volume` takes it.
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

    pending: list[ObjectSums] = [ObjectSums.empty(len(numbers), volume.dtype)]
    blocks = BlockPlan.make(shape=labels.shape[1:], block_size=_block_size(labels.chunk_shape), halo=1)
    for block in tqdm(blocks, total=len(blocks), desc="measure", unit="block", disable=not progress):
        roi = block.owned
        codes, ids = _read_codes(labels, roi)
        if len(ids) == 0:
            continue
        pending.append(sum_block(codes, ids, roi, volume))
        if sum(len(part.ids) for part in pending[1:]) > 2 * len(pending[0].ids) + _PENDING_ROWS:
            pending = [join_sums(pending)]
        if regions is not None:
            regions.add(codes[:-1, :-1, :-1], ids, roi)
    objects = join_sums(pending)
    columns: dict[str, NDArray] = {"id": objects.ids, **shape_columns(objects, voxel_um)}
    columns |= intensity_columns(objects, numbers)
    if regions is not None:
        columns |= regions.columns(objects.voxels)
    rows = pd.DataFrame(columns)
    write_table((rows[start : start + _ROWS] for start in range(0, max(1, len(rows)), _ROWS)), path)
    return path


def _read_codes(labels: Volume, roi: Roi) -> tuple[NDArray[np.int32], Integers]:
    """The objects of a ROI and of one more voxel at its upper faces, background beyond the volume's end."""
    stop = [min(end + 1, extent) for end, extent in zip(roi[3:], labels.shape[1:], strict=True)]
    block = labels.read((*roi[:3], *stop))[0]
    codes, ids = compact_labels(block, ignore=None if block.dtype == bool else int(np.iinfo(block.dtype).max))
    beyond = [(0, end + 1 - last) for end, last in zip(roi[3:], stop, strict=True)]
    return np.pad(np.maximum(codes, 0), beyond), ids


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
    level: int | str,
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
