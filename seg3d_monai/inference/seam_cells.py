"""Two label volumes of one region compared cell by cell, without annotation. These are the words:

*Cell.* Objects of the two answers that share more than half of the voxels of the smaller one belong together; a cell is
all objects that are joined so, usually one of each answer. Every object is in exactly one cell. The IoU of a cell is
that of all voxels of its first answer with all voxels of its second one.

*Lost.* The IoU of the cell is below `LOST_IOU`: one answer has no object there, or only a piece of it.
*Split.* One object of the first answer is two or more in the second. *Merged.* The reverse. *Mixed.* Several in both.
*Moved.* One object in both, but their IoU is below `min_iou` or their centroids are further apart than `max_shift`.
*Same.* Neither of these. A cell has one of the six kinds, the first that fits in this order.

*At a face.* An object of the cell has a voxel next to a face between two blocks of either grid. *Away.* None has.
*Cut.* An object of the cell reaches the border of the region where the volume goes on: it is not counted.

This file knows label arrays and places of faces; it must not know blocks' predictions or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from skimage.measure import regionprops_table

from seg3d_monai.inference.blocks import Roi

KINDS = ("split", "merged", "mixed", "lost", "moved")
SAME = "same"
LOST_IOU = 0.3
DEFAULT_MIN_IOU = 0.5

Faces = tuple[Sequence[int], Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Cell:
    """One cell as the two answers see it; the module's docstring defines the words.

    Attributes:
        kind: "same" or one of `KINDS`.
        at_face: whether it lies at a face of either grid.
        is_cut: whether it reaches the border of the region where the volume goes on.
        first_ids: its objects in the first answer.
        second_ids: its objects in the second answer.
        box: (z1, y1, x1, z2, y2, x2) around all of them, volume voxels, half-open.
        centroid: (z, y, x) mean index of the voxels of all of them, volume voxels.
        iou: of the two answers.
        shift: distance of the two answers' centroids, micrometer, or voxels if the spacing is unknown; None if one
            answer has no object.
    """

    kind: str
    at_face: bool
    is_cut: bool
    first_ids: tuple[int, ...]
    second_ids: tuple[int, ...]
    box: Roi
    centroid: tuple[float, float, float]
    iou: float
    shift: float | None


def compare_labels(
    first: NDArray[np.integer],
    second: NDArray[np.integer],
    *,
    faces: Faces,
    origin: Sequence[int] = (0, 0, 0),
    spacing: Sequence[float] | None = None,
    goes_on: Sequence[bool] = (False,) * 6,
    min_iou: float = DEFAULT_MIN_IOU,
    max_shift: float | None = None,
) -> list[Cell]:
    """The cells of two answers to the same region; swapping the answers swaps split and merged, and no more.

    Args:
        first: labels [d, h, w], 0 = background.
        second: labels of the same shape; its ids need not be those of `first`.
        faces: along z, y and x, the first voxel behind every face of either grid, volume voxels.
        origin: (z, y, x) of the region's first voxel in the volume.
        spacing: (z, y, x) micrometer per voxel; None counts shifts in voxels.
        goes_on: whether the volume goes on beyond the region, at its lower z, y, x and its upper z, y, x end.
        min_iou: as in `seam_check`.
        max_shift: as in `seam_check`.

    Returns:
        All cells, the same and the cut ones included, by their lowest id in the first answer; those that only the
        second one has come last.

    Raises:
        ValueError: if the shapes differ or a limit is out of its range.
    """
    if first.ndim != 3 or first.shape != second.shape:
        raise ValueError(f"first has shape {first.shape} and second {second.shape}; pass two equal [d, h, w]")
    check_limits(min_iou, max_shift)
    step = np.ones(3) if spacing is None else np.asarray(spacing, dtype=np.float64)
    local = [[face - start for face in along] for along, start in zip(faces, origin, strict=True)]
    one, other = (_measure(labels, local, goes_on) for labels in (first, second))
    objects = {name: np.concatenate([one[name], other[name]]) for name in one}
    num_first = len(one["label"])
    voxels = objects["area"].astype(np.int64)
    mean = np.stack([objects[f"centroid-{a}"] for a in range(3)], axis=1) + origin
    lower = np.stack([objects[f"bbox-{a}"] for a in range(3)], axis=1) + origin
    upper = np.stack([objects[f"bbox-{a + 3}"] for a in range(3)], axis=1) + origin

    rows, columns, overlap = _overlaps(first, second)
    a = np.searchsorted(one["label"], rows)
    b = num_first + np.searchsorted(other["label"], columns)
    together = 2 * overlap > np.minimum(voxels[a], voxels[b])
    graph = coo_array((np.ones(together.sum()), (a[together], b[together])), shape=(len(voxels), len(voxels)))
    num_cells, cell_of = connected_components(graph, directed=False)
    within = cell_of[a] == cell_of[b]  # also pairs that alone would not belong together
    shared = np.bincount(cell_of[a[within]], weights=overlap[within], minlength=num_cells)

    cells = []
    order = np.argsort(cell_of, kind="stable")
    for number, members in enumerate(np.split(order, np.flatnonzero(np.diff(cell_of[order])) + 1) if num_cells else []):
        sides = members[members < num_first], members[members >= num_first]
        total = int(voxels[members].sum())
        iou = float(shared[number] / (total - shared[number]))
        shift = None
        if len(sides[0]) and len(sides[1]):
            ends = [np.average(mean[side], axis=0, weights=voxels[side]) for side in sides]
            shift = float(np.linalg.norm((ends[0] - ends[1]) * step))
        # Half the radius of a ball that has the mean volume of the two answers.
        limit = 0.5 * (3 * total / 2 * step.prod() / (4 * np.pi)) ** (1 / 3) if max_shift is None else max_shift
        z, y, x = (float(v) for v in np.average(mean[members], axis=0, weights=voxels[members]))
        z1, y1, x1 = (int(v) for v in lower[members].min(axis=0))
        z2, y2, x2 = (int(v) for v in upper[members].max(axis=0))
        cells.append(
            Cell(
                kind=_kind(len(sides[0]), len(sides[1]), iou, shift is not None and shift > limit, min_iou),
                at_face=bool(objects["at_face"][members].any()),
                is_cut=bool(objects["is_cut"][members].any()),
                first_ids=tuple(objects["label"][sides[0]].tolist()),
                second_ids=tuple(objects["label"][sides[1]].tolist()),
                box=(z1, y1, x1, z2, y2, x2),
                centroid=(z, y, x),
                iou=iou,
                shift=shift,
            )
        )
    return cells


def _kind(num_first: int, num_second: int, iou: float, is_far: bool, min_iou: float) -> str:
    if iou < LOST_IOU:
        return "lost"
    if num_first > 1 and num_second > 1:
        return "mixed"
    if num_second > 1:
        return "split"
    if num_first > 1:
        return "merged"
    return "moved" if iou < min_iou or is_far else SAME


def _measure(
    labels: NDArray[np.integer], faces: Sequence[Sequence[int]], goes_on: Sequence[bool]
) -> dict[str, NDArray[Any]]:
    """Columns label, area, bbox-*, centroid-*, at_face, is_cut of the objects, by ascending id."""
    columns = dict(regionprops_table(labels, properties=("label", "area", "bbox", "centroid")))
    by_face, by_border = [], []
    for axis, along in enumerate(faces):
        planes = np.moveaxis(labels, axis, 0)
        by_face += [planes[face - 1 : face + 1] for face in along]
        by_border += [planes[end] for end, is_open in ((0, goes_on[axis]), (-1, goes_on[axis + 3])) if is_open]
    for name, parts in (("at_face", by_face), ("is_cut", by_border)):
        touched = [np.unique(part) for part in parts]
        columns[name] = np.isin(columns["label"], np.concatenate(touched) if touched else [])
    return columns


def _overlaps(first: NDArray[np.integer], second: NDArray[np.integer]) -> tuple[NDArray, NDArray, NDArray]:
    """(id in first, id in second, voxels that they share), background left out."""
    shape = (int(first.max(initial=0)) + 1, int(second.max(initial=0)) + 1)
    total = csr_array(shape, dtype=np.int64)
    for a, b in zip(first, second, strict=True):  # a plane at a time: the pairs of all voxels would fill the memory
        total += coo_array((np.ones(a.size, np.int64), (a.ravel(), b.ravel())), shape=shape).tocsr()
    pairs = total.tocoo()
    real = (pairs.row > 0) & (pairs.col > 0)
    return pairs.row[real], pairs.col[real], pairs.data[real]


def check_limits(min_iou: float, max_shift: float | None) -> None:
    """Refuse limits that `seam_check` cannot use.

    Raises:
        ValueError: if one is out of its range.
    """
    if not LOST_IOU <= min_iou <= 1:
        raise ValueError(f"min_iou is {min_iou}; pass a number from {LOST_IOU}, below which a cell is lost, to 1")
    if max_shift is not None and not max_shift > 0:
        raise ValueError(f"max_shift is {max_shift}; pass micrometers more than 0, or None for half a radius")
