"""A region's files for napari: image, labels to correct, and the margin that does not count.

TIFF, because napari opens it as arrays that can be painted on and saves it in place (labels of an OME-Zarr open lazily
or multiscale, and neither can be painted). Its own reader takes no voxel size from a TIFF, so it is given on the
command line; for everyone else the files say it as OME metadata.

Must not know: networks, how regions are chosen.
"""

import csv
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seg3d_monai.data.targets import compact_labels
from seg3d_monai.data.tiff_write import write_ome_tiff
from seg3d_monai.data.volume import Roi, Spacing
from seg3d_monai.inference import Instances
from seg3d_monai.inference.blocks import roi_shape, roi_slices

LABELS, MARGIN, CLASSES = "labels.tif", "margin.tif", "classes.csv"
SEEN_BEFORE = 0.5
"""A prediction of which so much is annotated already is an object that was annotated before."""


def labels_to_correct(
    found: Instances, window: Roi, known: NDArray[np.integer] | None, ignore: int, accept_score: float
) -> tuple[NDArray[np.uint32], tuple[int, ...], dict[int, int]]:
    """What the annotator begins with: what is annotated already, and the prediction where nothing is.

    Args:
        found: instances in the window's frame.
        window: (z1, y1, x1, z2, y2, x2) in the volume frame.
        known: the volume's labels in the window, [d, h, w]; None where it has none.
        ignore: the value in `known` that means unannotated.
        accept_score: instances with a lower score are left out.

    Returns:
        labels [d, h, w], the ids that 1, 2, … stand for in `known`, and the class of each further id. A voxel that two
        predictions claim goes to the higher score.
    """
    labels = np.zeros(roi_shape(window), np.uint32)
    is_open = np.ones(labels.shape, bool)
    known_ids: tuple[int, ...] = ()
    if known is not None:
        codes, ids = compact_labels(known, ignore=ignore)
        is_open = codes < 0
        labels[~is_open] = codes[~is_open]
        known_ids = tuple(ids.tolist())
    classes: dict[int, int] = {}
    placed = sorted(found.place((0, 0, 0, *labels.shape)), key=lambda one: -one.score)
    for instance in placed:
        if instance.score < accept_score:
            break
        place = roi_slices(instance.roi)
        free = instance.mask & is_open[place]
        if np.count_nonzero(free) <= SEEN_BEFORE * np.count_nonzero(instance.mask):
            continue
        free &= labels[place] == 0
        if free.any():
            number = len(known_ids) + len(classes) + 1
            labels[place][free] = number
            classes[number] = instance.class_index
    return labels, known_ids, classes


def write_region(
    folder: Path,
    *,
    image: NDArray[np.generic],
    labels: NDArray[np.uint32],
    roi: Roi,
    window: Roi,
    spacing_um: Spacing | None,
    classes: Mapping[int, int],
) -> list[str]:
    """Write a region's files.

    Args:
        folder: new folder.
        image: [C, d, h, w] raw voxels of the window; each channel becomes a file.
        labels: [d, h, w].
        roi: what counts, volume frame.
        window: what is exported, volume frame.
        spacing_um: micrometres per voxel (z, y, x), if known.
        classes: class of each id, to be corrected too; empty where there is one class only.

    Returns:
        Names of the files to open, the labels last, so that they lie on top and are selected.
    """
    folder.mkdir()
    names = ["image.tif"] if len(image) == 1 else [f"image_{channel}.tif" for channel in range(len(image))]
    for name, channel in zip(names, image, strict=True):
        write_ome_tiff(folder / name, _as_picture(channel), spacing_um, compressed=True)
    margin = np.ones(labels.shape, np.uint32)
    margin[roi_slices(roi, window[:3])] = 0
    if margin.any():
        names.append(MARGIN)
        write_ome_tiff(folder / MARGIN, margin, spacing_um, compressed=True)
    write_ome_tiff(folder / LABELS, labels, spacing_um, compressed=True)
    if classes:
        with (folder / CLASSES).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("id", "class"), *sorted(classes.items())])
    return [*names, LABELS]


def napari_command(folder: Path, names: Sequence[str], spacing_um: Spacing | None) -> str:
    """The command that opens a region's files at the right scale."""
    words = ["napari", *(str(folder / name) for name in names)]
    if spacing_um is not None:
        words += ["--scale", "({:g},{:g},{:g})".format(*spacing_um)]
    return shlex.join(words)


def _as_picture(channel: NDArray[np.generic]) -> NDArray[np.generic]:
    """Voxels of a type that napari takes for an image: it takes integers of 32 bits and more for labels."""
    if channel.dtype == bool:
        return channel.astype(np.uint8)
    is_wide = channel.dtype.kind in "iu" and channel.dtype.itemsize >= 4
    return channel.astype(np.float32) if is_wide or channel.dtype == np.float16 else channel
