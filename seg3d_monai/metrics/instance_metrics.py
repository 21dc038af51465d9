"""Instance segmentation scores, pooled over volumes.

At each IoU threshold: tp, fp, fn, precision, recall, f1, ap_dsb = TP / (TP + FP + FN) (Data Science Bowl 2018), pq
(panoptic quality, Kirillov et al. 2019: sum of matched IoU / (TP + FP/2 + FN/2)). And:

- map: mean ap_dsb over thresholds 0.5, 0.55 … 0.95;
- seg (Cell Tracking Challenge): mean over true objects of the IoU with the prediction that covers more than half of
  it, else 0;
- mucov: mean over predicted objects of the best IoU;
- aji (Kumar et al. 2017): each true object takes its best prediction; sum of intersections over sum of unions, to which
  the voxels of predictions that none took are added;
- foreground_iou: object against background.

Conventions. Counts and sums are pooled over volumes before any ratio, so an empty volume adds nothing, and a prediction
in it adds false positives. A ratio with nothing in its denominator is 0.0 (as in StarDist), never NaN: nothing true and
nothing predicted in all volumes scores 0.0 everywhere. Ignored truth voxels are left out of every count; a predicted
object with more than half of its voxels in them may still match, but is never a false positive, and does not enter
num_predicted, mucov nor, where no true object takes it, aji.

It must not know files or models.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from seg3d_monai.metrics.contingency import ContingencyTable, Overlaps
from seg3d_monai.metrics.matching import match_instances

MAP_THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
THRESHOLDS = (0.1, 0.25, *MAP_THRESHOLDS)


class InstanceMetrics:
    """Gathers volumes and computes the scores of this module.

    `update` takes a whole volume. For a volume that does not fit in memory, fill a `ContingencyTable` block by block
    and give it to `add_table`.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all volumes."""
        self._counts = np.zeros((len(THRESHOLDS), 3), dtype=np.int64)  # tp, fp, fn
        self._matched_iou = np.zeros(len(THRESHOLDS))
        self._num_volumes = 0
        self._num_truth = 0
        self._num_predicted = 0
        self._seg_sum = 0.0
        self._mucov_sum = 0.0
        self._aji = np.zeros(2, dtype=np.int64)  # intersection, union
        self._foreground = np.zeros(2, dtype=np.int64)

    def update(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Add a volume.

        Args:
            truth: integer labels [Z, Y, X], 0 background; the maximum of an unsigned dtype, or -1, is ignored.
            prediction: integer labels of the same shape, 0 background.

        Raises:
            ValueError: shapes differ, or labels are not integers >= 0.
        """
        table = ContingencyTable()
        table.add(truth, prediction)
        self.add_table(table)

    def add_table(self, table: ContingencyTable) -> None:
        """Add a volume that was counted block by block."""
        overlaps = table.overlaps()
        num_truth, num_predicted = len(overlaps.truth_ids), len(overlaps.predicted_ids)
        excused = 2 * overlaps.predicted_ignored > overlaps.predicted_voxels + overlaps.predicted_ignored
        for row, threshold in enumerate(THRESHOLDS):
            matched = match_instances(overlaps.truth_index, overlaps.predicted_index, overlaps.iou, threshold)
            is_unmatched = ~excused
            is_unmatched[overlaps.predicted_index[matched]] = False
            self._counts[row] += (len(matched), int(is_unmatched.sum()), num_truth - len(matched))
            self._matched_iou[row] += float(overlaps.iou[matched].sum())
        covering = 2 * overlaps.intersection > overlaps.truth_voxels[overlaps.truth_index]
        best_iou = np.zeros(num_predicted)
        np.maximum.at(best_iou, overlaps.predicted_index, overlaps.iou)
        self._num_volumes += 1
        self._num_truth += num_truth
        self._num_predicted += int((~excused).sum())
        self._seg_sum += float(overlaps.iou[covering].sum())
        self._mucov_sum += float(best_iou[~excused].sum())
        self._aji += _aji_parts(overlaps, excused)
        self._foreground += (overlaps.foreground_intersection, overlaps.foreground_union)

    def merge(self, other: InstanceMetrics) -> None:
        """Add the volumes of another instance, such as another process's."""
        self._counts += other._counts
        self._matched_iou += other._matched_iou
        self._num_volumes += other._num_volumes
        self._num_truth += other._num_truth
        self._num_predicted += other._num_predicted
        self._seg_sum += other._seg_sum
        self._mucov_sum += other._mucov_sum
        self._aji += other._aji
        self._foreground += other._foreground

    def compute(self) -> dict[str, Any]:
        """The scores so far.

        Returns:
            JSON-able: "thresholds" (by "0.1", "0.25", "0.5", "0.55" … "0.95": tp, fp, fn, precision, recall, f1,
            ap_dsb, pq), "map", "seg", "mucov", "aji", "foreground_iou", "num_volumes", "num_truth", "num_predicted".
        """
        thresholds: dict[str, dict[str, float | int]] = {}
        for threshold, (tp, fp, fn), iou_sum in zip(
            THRESHOLDS, self._counts.tolist(), self._matched_iou.tolist(), strict=True
        ):
            thresholds[str(threshold)] = {
                "tp": tp,
                "fp": fp,
                "fn": fn,
                "precision": _ratio(tp, tp + fp),
                "recall": _ratio(tp, tp + fn),
                "f1": _ratio(2 * tp, 2 * tp + fp + fn),
                "ap_dsb": _ratio(tp, tp + fp + fn),
                "pq": _ratio(iou_sum, tp + (fp + fn) / 2),
            }
        return {
            "thresholds": thresholds,
            "map": sum(thresholds[str(t)]["ap_dsb"] for t in MAP_THRESHOLDS) / len(MAP_THRESHOLDS),
            "seg": _ratio(self._seg_sum, self._num_truth),
            "mucov": _ratio(self._mucov_sum, self._num_predicted),
            "aji": _ratio(*self._aji.tolist()),
            "foreground_iou": _ratio(*self._foreground.tolist()),
            "num_volumes": self._num_volumes,
            "num_truth": self._num_truth,
            "num_predicted": self._num_predicted,
        }


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else 0.0


def _aji_parts(overlaps: Overlaps, excused: np.ndarray) -> tuple[int, int]:
    """Sums of intersections and of unions of the aggregated Jaccard index."""
    num_truth = len(overlaps.truth_ids)
    # Pairs by truth and falling IoU, ties by lower prediction: the first of each true object is its best.
    order = np.lexsort((overlaps.predicted_index, -overlaps.iou, overlaps.truth_index))
    truth_index = overlaps.truth_index[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = truth_index[1:] != truth_index[:-1]
    best = order[is_first]
    is_alone = np.ones(num_truth, dtype=bool)
    is_alone[overlaps.truth_index[best]] = False
    is_unused = ~excused
    is_unused[overlaps.predicted_index[best]] = False
    intersection = int(overlaps.intersection[best].sum())
    union = int(
        overlaps.union[best].sum() + overlaps.truth_voxels[is_alone].sum() + overlaps.predicted_voxels[is_unused].sum()
    )
    return intersection, union
