"""What a report shows of one volume, and where its truth and its prediction disagree.

It must not know files, pictures or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from seg3d_monai.inference.seam_cells import SAME, Cell, compare_labels
from seg3d_monai.metrics import ContingencyTable, match_instances
from seg3d_monai.metrics.contingency import ignore_value

KINDS = ("missed", "false positive", "split", "merged", "mixed", "poor outline")
MATCH_IOU = 0.5
Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class LookedAt:
    """A volume, or a part of one.

    name: what it is called.
    image: [Z, Y, X] of one channel.
    labels: predicted ids [Z, Y, X], 0 background.
    table: of the predicted objects: id, score, volume_voxels, volume_um3 …
    truth: true ids [Z, Y, X]; the dtype's maximum, or -1, is not annotated. None where nobody knows.
    spacing_um: (z, y, x) micrometres per voxel, None where it is unknown.
    origin: (z, y, x) of the first voxel in the volume.
    """

    name: str
    image: Array
    labels: Array
    table: pd.DataFrame
    truth: Array | None = None
    spacing_um: tuple[float, float, float] | None = None
    origin: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A place where truth and prediction disagree.

    kind: one of `KINDS`.
    volume: name of the volume.
    box: (z1, y1, x1, z2, y2, x2), voxels of what is looked at.
    centroid: (z, y, x), voxels of the volume.
    true_ids, predicted_ids: of the objects.
    iou: of all true with all predicted ones.
    score: highest of the predicted objects, None without any.
    voxels: of the larger of the two sides.
    """

    kind: str
    volume: str
    box: tuple[int, int, int, int, int, int]
    centroid: tuple[float, float, float]
    true_ids: tuple[int, ...]
    predicted_ids: tuple[int, ...]
    iou: float
    score: float | None
    voxels: int


def known_truth(truth: Array) -> Array:
    """True ids as int64, 0 also where nothing is annotated."""
    ignore = ignore_value(truth.dtype)
    ids = truth.astype(np.int64)
    return ids if ignore is None else np.where(ids == ignore, 0, ids)


def faults(looked: LookedAt) -> list[Fault]:
    """Where truth and prediction disagree, the gravest of each kind first; nothing without truth.

    Grave is a false positive of a high score, and anything else that is large. A predicted object that lies mostly
    where nothing is annotated is no fault.
    """
    if looked.truth is None:
        return []
    truth = known_truth(looked.truth)
    ignore = ignore_value(looked.truth.dtype)
    hidden = looked.truth == ignore if ignore is not None else np.zeros(truth.shape, bool)
    predicted = looked.labels.astype(np.int64)
    true_voxels, voxels = np.bincount(truth.ravel()), np.bincount(predicted.ravel())
    outside = 2 * np.bincount(predicted[hidden], minlength=len(voxels)) > voxels
    scores = dict(zip(looked.table["id"].tolist(), looked.table["score"].tolist(), strict=True))
    found = []
    for cell in compare_labels(truth, predicted, faces=((), (), ()), spacing=looked.spacing_um):
        kind = _kind(cell)
        if kind is None or (not cell.first_ids and all(outside[i] for i in cell.second_ids)):
            continue
        known = [scores[i] for i in cell.second_ids if i in scores]
        sides = [int(true_voxels[list(cell.first_ids)].sum()), int(voxels[list(cell.second_ids)].sum())]
        z, y, x = (place + start for place, start in zip(cell.centroid, looked.origin, strict=True))
        found.append(
            Fault(
                kind=kind,
                volume=looked.name,
                box=cell.box,
                centroid=(z, y, x),
                true_ids=cell.first_ids,
                predicted_ids=cell.second_ids,
                iou=cell.iou,
                score=max(known) if known else None,
                voxels=max(sides),
            )
        )
    return sorted(found, key=gravity, reverse=True)


def gravity(fault: Fault) -> tuple[float, int]:
    """What faults of one kind are ordered by."""
    is_false = fault.kind == "false positive"
    return (fault.score or 0.0 if is_false else 0.0, fault.voxels)


def _kind(cell: Cell) -> str | None:
    if not cell.second_ids:
        return "missed"
    if not cell.first_ids:
        return "false positive"
    if cell.kind in ("split", "merged", "mixed"):
        return cell.kind
    return "poor outline" if cell.kind != SAME and cell.iou < MATCH_IOU else None


def scored_matches(volumes: Sequence[LookedAt], threshold: float = MATCH_IOU) -> tuple[Array, Array, int]:
    """What a precision-recall curve is made of.

    Returns:
        Scores of all predicted objects that count, descending; whether each matches a true object at the threshold; and
        the number of true objects.
    """
    scores, hits, num_truth = [], [], 0
    for looked in volumes:
        if looked.truth is None:
            continue
        table = ContingencyTable()
        table.add(looked.truth, looked.labels)
        overlaps = table.overlaps()
        matched = match_instances(overlaps.truth_index, overlaps.predicted_index, overlaps.iou, threshold)
        is_hit = np.zeros(len(overlaps.predicted_ids), bool)
        is_hit[overlaps.predicted_index[matched]] = True
        counts = is_hit | (2 * overlaps.predicted_ignored <= overlaps.predicted_voxels + overlaps.predicted_ignored)
        by_id = dict(zip(looked.table["id"].tolist(), looked.table["score"].tolist(), strict=True))
        scores.append([by_id.get(int(i), 1.0) for i in overlaps.predicted_ids[counts]])
        hits.append(is_hit[counts])
        num_truth += len(overlaps.truth_ids)
    all_scores, all_hits = (np.concatenate([np.zeros(0), *parts]) for parts in (scores, hits))
    order = np.argsort(-all_scores, kind="stable")
    return all_scores[order], all_hits[order].astype(bool), num_truth
