"""Reads the labels that annotators saved, tells corrected regions from untouched ones, and lists every fault at once.

Must not know: manifests beyond a row, how labels are merged into volumes.
"""

import csv
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from seg3d_monai.annotation.export import CLASSES
from seg3d_monai.annotation.task import AnnotationTask, Region, labels_digest
from seg3d_monai.data import Volume, open_volume
from seg3d_monai.data.manifest import VOLUME_SUFFIXES
from seg3d_monai.data.targets import compact_labels
from seg3d_monai.inference.blocks import roi_shape, roi_slices

IGNORE = int(np.iinfo(np.uint32).max)
"""The id that an annotator gives to voxels that nobody can tell."""
STRAY = 0.1
"""Share of an object below which a separate piece of it is taken for a slip of the brush."""
_MOST_IDS = 2**31
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corrected:
    """Labels of one region that are taken for truth.

    Args:
        region: as it was suggested.
        labels: uint32 [d, h, w] over the region's window; 0 background, `IGNORE` unannotated.
        classes: class of each id, where there are several classes; else empty.
    """

    region: Region
    labels: NDArray[np.uint32]
    classes: Mapping[int, int]

    @property
    def inside(self) -> NDArray[np.uint32]:
        """The part that counts."""
        return self.labels[roi_slices(self.region.roi, self.region.window[:3])]


def read_corrected(
    folder: Path,
    task: AnnotationTask,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    only: Collection[int] | None = None,
    accept_unchanged: bool = False,
    allow_empty: bool = False,
) -> tuple[list[Corrected], list[Region]]:
    """Read all regions of a folder.

    Args:
        folder: that `suggest_regions` wrote.
        task: its task.
        shapes: (z, y, x) of the manifest's volumes by name.
        only: numbers of the regions to look at; None for all.
        accept_unchanged: whether labels that nobody changed are taken for truth.
        allow_empty: whether a region may hold no object.

    Returns:
        What is taken for truth, and the regions that nobody changed.

    Raises:
        ValueError: anything is at fault; all faults are listed.
    """
    faults: list[str] = []
    known = {region.number for region in task.regions}
    unknown = sorted(set(only or ()) - known)
    if unknown:
        faults.append(f"only: {unknown} are no regions of the folder; they are {_ranges(known)}")
    taken, untouched = [], []
    for region in task.regions:
        if only is not None and region.number not in only:
            continue
        problems: list[str] = []
        labels = _read(folder / region.folder, region, shapes, problems)
        if labels is not None:
            if labels_digest(labels) == region.labels_sha256 and not accept_unchanged:
                untouched.append(region)
            else:
                classes = _classes(folder / region.folder, region, labels, task.num_classes, problems)
                one = Corrected(region, labels, classes)
                if not allow_empty and not ((one.inside > 0) & (one.inside != IGNORE)).any():
                    problems.append("holds no object; if there is none, say so with allow_empty (--allow_empty)")
                taken.append(one)
        faults += [f"{region.folder}: {problem}" for problem in problems]
    if faults:
        raise ValueError(f"{folder}: {len(faults)} fault(s):\n" + "\n".join(f"  {fault}" for fault in faults))
    for one in taken:
        _warn_of_pieces(one)
    return taken, untouched


def _read(
    folder: Path, region: Region, shapes: Mapping[str, tuple[int, ...]], problems: list[str]
) -> NDArray[np.uint32] | None:
    """A region's labels; None, with what is wrong, where they are not sound."""
    if region.volume not in shapes:
        problems.append(f"its volume {region.volume!r} is not in the manifest; give the one that the index was made of")
        return None
    if shapes[region.volume] != region.shape:
        problems.append(
            f"its volume {region.volume!r} was {region.shape} voxels (z, y, x) and is {shapes[region.volume]} now; "
            "suggest regions again"
        )
        return None
    paths = [folder / f"labels{suffix}" for suffix in VOLUME_SUFFIXES]
    paths = [path for path in paths if path.exists()]
    if len(paths) != 1:
        found = " and ".join(path.name for path in paths)
        problems.append(
            f"{found} are both there; keep the corrected one"
            if found
            else "labels.tif is not there; save the layer labels under this name, or name the other regions in only"
        )
        return None
    try:
        axes = None
        if paths[0].suffix in (".tif", ".tiff"):
            # napari saves three or four planes as the samples of a single one, and one plane without depth.
            axes = "YX" if roi_shape(region.window)[0] == 1 else "ZYX"
        volume = open_volume(paths[0], axes=axes)
        return _checked(volume, paths[0].name, region, problems)
    except (ValueError, TypeError, OSError, ImportError) as error:
        problems.append(str(error))
        return None


def _checked(volume: Volume, name: str, region: Region, problems: list[str]) -> NDArray[np.uint32] | None:
    expected = roi_shape(region.window)
    if volume.shape[0] != 1 or volume.shape[1:] != expected:
        shape = volume.shape[1:] if volume.shape[0] == 1 else volume.shape
        problems.append(f"{name} has shape {shape} and was exported as {expected}; save the whole layer labels")
        return None
    if volume.dtype.kind not in "iu":
        problems.append(f"{name} holds {volume.dtype} voxels; save ids as integers, uint32")
        return None
    voxels = volume.read((0, 0, 0, *expected))[0]
    if int(voxels.min()) < 0:
        problems.append(f"{name} holds the id {int(voxels.min())}; ids are from 1, 0 is background")
        return None
    ignored = voxels == np.iinfo(voxels.dtype).max
    if voxels.dtype.itemsize == 8:  # where such a file came from 32 bits
        ignored |= voxels == IGNORE
    largest = int(voxels.max(initial=0, where=~ignored))
    if largest >= _MOST_IDS:
        problems.append(f"{name} holds the id {largest}; number objects from 1")
        return None
    labels = np.where(ignored, 0, voxels).astype(np.uint32)
    labels[ignored] = IGNORE
    return labels


def _classes(
    folder: Path, region: Region, labels: NDArray[np.uint32], num_classes: int, problems: list[str]
) -> dict[int, int]:
    """Class of each id that counts, from the region's table."""
    if num_classes == 1:
        return {}
    path = folder / CLASSES
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file) if any(line)]
        classes = {int(line[0]): int(line[1]) for line in lines[1:]}
    except (OSError, ValueError, IndexError, csv.Error) as error:
        problems.append(f"{CLASSES} cannot be read ({error}); it holds lines id,class")
        return {}
    wrong = sorted(number for number, kind in classes.items() if kind < 0)
    if wrong:
        problems.append(f"{CLASSES} gives ids {wrong[:5]} a class below 0; classes count from 0")
    inside = np.unique(labels[roi_slices(region.roi, region.window[:3])])
    missing = [n for n in inside.tolist() if n not in (0, IGNORE) and n not in classes]
    if missing:
        problems.append(f"ids {missing[:5]}{' …' if len(missing) > 5 else ''} have no class; add them to {CLASSES}")
    return {number: classes[number] for number in inside.tolist() if number in classes}


def _warn_of_pieces(one: Corrected) -> None:
    """Two cells under one id are the commonest slip; a prediction may be in pieces too, so it is no fault."""
    codes, ids = compact_labels(one.labels, ignore=IGNORE)
    split = []
    for code, place in enumerate(ndimage.find_objects(codes), start=1):
        pieces, count = ndimage.label(codes[place] == code, structure=np.ones((3, 3, 3)))
        sizes = np.bincount(pieces.reshape(-1))[1:]
        if count > 1 and np.count_nonzero(sizes >= STRAY * sizes.sum()) > 1:
            split.append(int(ids[code - 1]))
    if split:
        shown = ", ".join(map(str, split[:5])) + (" …" if len(split) > 5 else "")
        _log.warning("%s: objects %s are in several pieces; two cells under one id?", one.region.folder, shown)


def _ranges(numbers: Collection[int]) -> str:
    return f"{min(numbers)} to {max(numbers)}" if numbers else "none"
