"""Writes a volume's labels anew, with the corrected regions in them; the labels that were there are only read.

The new labels are a Zarr whose fill value is *ignore*: of a volume that had no labels, only the regions are stored,
however large it is. They are written beside their place and renamed when they are complete, under a name that follows
from all that went into them, so that the same import finds them again and another one never touches them.

Must not know: tasks on disk, the index, networks.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from seg3d_monai.annotation.corrected import IGNORE, Corrected
from seg3d_monai.annotation.task import Region, labels_digest
from seg3d_monai.data import ManifestRow, Volume
from seg3d_monai.data.file_evidence import evidence_of
from seg3d_monai.data.volume import Roi
from seg3d_monai.inference.blocks import roi_slices

CHUNK = (32, 128, 128)
_BLOCK_VOXELS = 2**24
_FACTS = "seg3d_monai"


@dataclass(frozen=True)
class Merged:
    """A volume with its new labels.

    Args:
        row: of the manifest, with the new labels and no mask.
        num_objects: objects that are new.
        num_kept: corrected voxels that were annotated before and stayed as they were.
    """

    row: ManifestRow
    num_objects: int
    num_kept: int


def merge_regions(
    row: ManifestRow,
    corrected: Sequence[Corrected],
    folder: Path,
    *,
    replace_known: bool = False,
    min_inside: float = 0.5,
) -> Merged:
    """Write the labels of a volume with the corrected regions.

    What was annotated before stays, as do its ids. Everything else outside the regions is ignore. New objects get ids
    that are not in use, by region and id. An object that reaches out of its region with more than it has inside is
    ignored: most of it is not annotated, and its rest alone would teach boxes that end at the region's face.

    Args:
        row: of the manifest, with or without labels.
        corrected: one or more regions of this volume.
        folder: for the new labels; made if missing.
        replace_known: whether corrections win over what was annotated before.
        min_inside: share of its voxels in the window that an object must have inside the region to count, 0 to 1.

    Returns:
        The volume with the new labels; `folder` holds them as NAME.DIGEST.zarr.

    Raises:
        ValueError: the ids in use leave no room for new ones, or a file cannot be read.
        OSError: the disk is full.
    """
    corrected = sorted(corrected, key=lambda one: one.region.number)
    label = None if row.label is None else row.open_label()
    mask = row.open_ignore()
    name = re.sub(r"[^\w.-]", "_", row.name)
    target = folder / f"{name}.{_digest(row, label, mask, corrected, replace_known, min_inside)}.zarr"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        _write(partial, row, label, mask, corrected, replace_known, min_inside)
        partial.rename(target)
    attributes: dict[str, Any] = dict(zarr.open_array(target, mode="r").attrs)
    facts = attributes[_FACTS]
    classes = row.classes
    if any(one.classes for one in corrected) or not isinstance(classes, int):
        classes = dict(classes) if not isinstance(classes, int) else dict.fromkeys(facts["ids_before"], classes)
        by_number = {one.region.number: one.classes for one in corrected}
        classes |= {new: by_number[number].get(old, 0) for number, old, new in facts["new_ids"]}
    merged = replace(row, label=target, ignore=None, classes=classes)
    return Merged(merged, len(facts["new_ids"]), facts["num_kept"])


def _write(
    path: Path,
    row: ManifestRow,
    label: Volume | None,
    mask: Volume | None,
    corrected: Sequence[Corrected],
    replace_known: bool,
    min_inside: float,
) -> None:
    shape = row.open_image().shape[1:]
    is_wide = label is not None and label.dtype.itemsize == 8
    dtype: np.dtype[np.unsignedinteger[Any]] = np.dtype(np.uint64 if is_wide else np.uint32)
    ignore = int(np.iinfo(dtype).max)
    array = zarr.create_array(
        path,
        shape=shape,
        dtype=dtype,
        chunks=tuple(min(c, n) for c, n in zip(CHUNK, shape, strict=True)),
        fill_value=ignore,
        dimension_names=["z", "y", "x"],
    )
    before: set[int] = set()
    largest = 0
    if label is not None:
        for roi in _blocks(array):
            block = _read(label, mask, roi, dtype)
            array[roi_slices(roi)] = block
            largest = max(largest, int(block.max(initial=0, where=block != ignore)))
            if isinstance(row.classes, int) and any(one.classes for one in corrected):
                before.update(np.unique(block[block != ignore]).tolist())
    new_ids: list[tuple[int, int, int]] = []
    num_kept = 0
    for one in corrected:
        place = roi_slices(one.region.roi)
        current = np.asarray(array[place])
        is_open = np.full(current.shape, True) if replace_known else current == ignore
        inside = _without_outsiders(one, min_inside)
        num_kept += int(np.count_nonzero(~is_open & (inside != IGNORE) & (inside != _exported(current, one.region))))
        table = {0: 0, IGNORE: ignore} | dict(enumerate(one.region.known_ids, start=1))
        for number in np.unique(inside[is_open]).tolist():
            if number not in table:
                table[number] = largest = largest + 1
                new_ids.append((one.region.number, number, largest))
        if largest >= ignore:
            raise ValueError(f"{row.name}: its ids reach up to {ignore - 1}, none is left; number its labels from 1")
        numbers, codes = np.unique(inside, return_inverse=True)
        mapped = np.array([table.get(number, 0) for number in numbers.tolist()], dtype)[codes].reshape(inside.shape)
        array[place] = np.where(is_open, mapped, current)
    array.attrs[_FACTS] = {"new_ids": new_ids, "ids_before": sorted(before - {0}), "num_kept": num_kept}


def _read(
    label: Volume, mask: Volume | None, roi: Roi, dtype: np.dtype[np.unsignedinteger[Any]]
) -> NDArray[np.unsignedinteger[Any]]:
    """Labels of a block, in the new type; the old type's maximum, and what the mask covers, is ignore."""
    block = label.read(roi)[0]
    ignored = block == np.iinfo(block.dtype).max
    if mask is not None:
        ignored |= mask.read(roi)[0] != 0
    block = block.astype(dtype)
    block[ignored] = np.iinfo(dtype).max
    return block


def _without_outsiders(one: Corrected, min_inside: float) -> NDArray[np.uint32]:
    """The part that counts, with ignore in place of new objects that lie outside for the most part."""
    inside = one.inside.copy()
    ids, counts = np.unique(inside, return_counts=True)
    totals = dict(zip(*(part.tolist() for part in np.unique(one.labels, return_counts=True)), strict=True))
    for number, count in zip(ids.tolist(), counts.tolist(), strict=True):
        is_new = number != IGNORE and number > len(one.region.known_ids)
        if is_new and count < min_inside * totals[number]:
            inside[inside == number] = IGNORE
    return inside


def _exported(current: NDArray[np.integer], region: Region) -> NDArray[np.int64]:
    """Ids of a volume as they were exported: 1, 2, … for those that were known, -1 for others."""
    known = np.array([0, *region.known_ids], np.int64)
    values, codes = np.unique(current.astype(np.int64), return_inverse=True)
    places = {value: place for place, value in enumerate(known.tolist())}
    table = np.array([places.get(value, -1) for value in values.tolist()], np.int64)
    return table[codes].reshape(current.shape)


def _blocks(array: Any) -> Iterator[Roi]:
    """Regions made of whole chunks."""
    step = list(array.chunks)
    for axis in (2, 1, 0):
        while step[axis] < array.shape[axis] and prod(step) * 2 <= _BLOCK_VOXELS:
            step[axis] *= 2
    for low in product(*(range(0, n, s) for n, s in zip(array.shape, step, strict=True))):
        z1, y1, x1 = low
        z2, y2, x2 = (min(a + s, n) for a, s, n in zip(low, step, array.shape, strict=True))
        yield z1, y1, x1, z2, y2, x2


def _digest(
    row: ManifestRow,
    label: Volume | None,
    mask: Volume | None,
    corrected: Sequence[Corrected],
    replace_known: bool,
    min_inside: float,
) -> str:
    """What the new labels depend on, in twelve letters."""
    regions = [
        (one.region.number, one.region.roi, one.region.known_ids, labels_digest(one.labels), [*one.classes.items()])
        for one in corrected
    ]
    facts = {
        "name": row.name,
        "label": None if label is None or row.label is None else evidence_of(label, row.label),
        "ignore": None if mask is None or row.ignore is None else evidence_of(mask, row.ignore),
        "regions": regions,
        "replace_known": replace_known,
        "min_inside": min_inside,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
