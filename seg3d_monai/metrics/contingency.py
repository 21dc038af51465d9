"""How many voxels each true object shares with each predicted one: a sparse table, filled block by block.

Only pairs that occur are held, never a truth x prediction matrix. Ids may have gaps and be as large as their dtype
allows. A table describes one volume, since an id means one object.

It must not know thresholds, matching or files.
"""

from __future__ import annotations

import numpy as np

_Rows = tuple[np.ndarray, np.ndarray, np.ndarray]  # truth id, predicted id, voxels


class ContingencyTable:
    """Voxels by (true id, predicted id) of one volume.

    Truth voxels that hold the ignore value (the maximum of an unsigned dtype, -1 of a signed one) count for nothing;
    how much of each predicted object they cover is kept in `predicted_ignored`.
    """

    def __init__(self) -> None:
        self._counted: list[_Rows] = []
        self._ignored: list[_Rows] = []
        self._pending = 0

    def add(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Count a block, which must not overlap one counted before.

        Args:
            truth: integer labels of any shape, 0 background.
            prediction: integer labels of the same shape, 0 background.

        Raises:
            ValueError: shapes differ, labels are not integers, or an id is negative (other than -1 in truth).
        """
        truth, prediction = np.asarray(truth), np.asarray(prediction)
        if truth.shape != prediction.shape:
            raise ValueError(f"truth has shape {truth.shape} and prediction {prediction.shape}; they must be equal")
        for name, labels in (("truth", truth), ("prediction", prediction)):
            if labels.dtype.kind not in "iub":
                raise ValueError(f"{name} has dtype {labels.dtype}; labels must be integers, convert them first")
        if truth.size == 0:
            return
        ignore = ignore_value(truth.dtype)
        true_ids, predicted_ids, voxels = _runs(truth.ravel(), prediction.ravel())
        is_ignored = np.zeros(len(true_ids), dtype=bool) if ignore is None else true_ids == ignore
        if true_ids.dtype.kind == "i" and bool(np.any((true_ids < 0) & ~is_ignored)):
            raise ValueError(f"truth holds the id {int(true_ids.min())}; ids are >= 0, and -1 where it is ignored")
        if predicted_ids.dtype.kind == "i" and bool(np.any(predicted_ids < 0)):
            raise ValueError(f"prediction holds the id {int(predicted_ids.min())}; ids are >= 0")
        self.add_counts(true_ids, predicted_ids, voxels, is_ignored)

    def add_counts(
        self, true_ids: np.ndarray, predicted_ids: np.ndarray, voxels: np.ndarray, is_ignored: np.ndarray
    ) -> None:
        """Take over voxels that are counted already; a pair may occur several times.

        Args:
            true_ids: integers [K] from 0; what stands in rows of ignored voxels does not matter.
            predicted_ids: integers [K] from 0.
            voxels: integers [K], how many share both.
            is_ignored: bool [K], rows of voxels whose truth is ignored.
        """
        counted = _summed(
            true_ids[~is_ignored].astype(np.uint64), predicted_ids[~is_ignored].astype(np.uint64), voxels[~is_ignored]
        )
        hidden = predicted_ids[is_ignored].astype(np.uint64)
        ignored = _summed(np.zeros_like(hidden), hidden, voxels[is_ignored])
        self._counted.append(counted)
        self._ignored.append(ignored)
        self._pending += len(counted[0]) + len(ignored[0])
        # Blocks repeat each other's pairs; folding them at times keeps the memory at a few tables.
        if self._pending > 2 * len(self._counted[0][0]) + 1_000_000:
            self._fold()

    def merge(self, other: ContingencyTable) -> None:
        """Take over the counts of another part of the same volume (another thread's or worker's blocks)."""
        self._counted.extend(other._counted)
        self._ignored.extend(other._ignored)
        self._fold()

    def _fold(self) -> None:
        self._counted = [_summed(*(np.concatenate(part) for part in zip(*self._counted, strict=True)))]
        self._ignored = [_summed(*(np.concatenate(part) for part in zip(*self._ignored, strict=True)))]
        self._pending = 0

    def overlaps(self) -> Overlaps:
        """The table as arrays over compact indices."""
        if not self._counted:
            empty = np.zeros(0, dtype=np.uint64)
            self._counted, self._ignored = (
                [(empty, empty, empty.astype(np.int64))],
                [(empty, empty, empty.astype(np.int64))],
            )
        self._fold()
        return Overlaps(self._counted[0], self._ignored[0])


class Overlaps:
    """A finished table. Objects are numbered by ascending id; background is not an object.

    Attributes:
        truth_ids: uint64 [T]. truth_voxels: int64 [T].
        predicted_ids: uint64 [P]. predicted_voxels: int64 [P], without ignored voxels.
        predicted_ignored: int64 [P], voxels of each predicted object where truth is ignored.
        truth_index, predicted_index, intersection: int64 [K], the pairs that share voxels.
        iou: float64 [K] of those pairs.
        foreground_intersection, foreground_union: voxels.
    """

    def __init__(self, counted: _Rows, ignored: _Rows) -> None:
        true_ids, predicted_ids, voxels = counted
        self.truth_ids, self.truth_voxels = _totals(true_ids, voxels)
        # A predicted object that lies wholly in ignored voxels is an object too, of no counted voxel.
        hidden_ids, hidden_voxels = _totals(ignored[1], ignored[2])
        seen_ids, seen_voxels = _totals(predicted_ids, voxels)
        self.predicted_ids = np.union1d(seen_ids, hidden_ids)
        self.predicted_voxels = np.zeros(len(self.predicted_ids), dtype=np.int64)
        self.predicted_voxels[np.searchsorted(self.predicted_ids, seen_ids)] = seen_voxels
        self.predicted_ignored = np.zeros(len(self.predicted_ids), dtype=np.int64)
        self.predicted_ignored[np.searchsorted(self.predicted_ids, hidden_ids)] = hidden_voxels

        both = (true_ids > 0) & (predicted_ids > 0)
        self.truth_index = np.searchsorted(self.truth_ids, true_ids[both])
        self.predicted_index = np.searchsorted(self.predicted_ids, predicted_ids[both])
        self.intersection = voxels[both]
        union = self.truth_voxels[self.truth_index] + self.predicted_voxels[self.predicted_index] - self.intersection
        self.union = union
        self.iou = self.intersection / union
        self.foreground_intersection = int(self.intersection.sum())
        self.foreground_union = int(voxels[(true_ids > 0) | (predicted_ids > 0)].sum())


def ignore_value(dtype: np.dtype) -> int | None:
    """The truth value that means "not annotated": an unsigned dtype's maximum, -1 for a signed one, None for bool."""
    if dtype.kind == "u":
        return int(np.iinfo(dtype).max)
    return -1 if dtype.kind == "i" else None


def _runs(truth: np.ndarray, prediction: np.ndarray) -> _Rows:
    """Runs of equal (truth, prediction) in memory order: some ten times fewer than voxels, so cheaper to sort."""
    changes = np.flatnonzero((truth[1:] != truth[:-1]) | (prediction[1:] != prediction[:-1])) + 1
    starts = np.concatenate([np.zeros(1, dtype=np.int64), changes])
    lengths = np.diff(starts, append=len(truth))
    return truth[starts], prediction[starts], lengths


def _summed(true_ids: np.ndarray, predicted_ids: np.ndarray, voxels: np.ndarray) -> _Rows:
    """Add up rows of the same pair; the result is sorted by pair."""
    if len(true_ids) == 0:
        return true_ids, predicted_ids, voxels.astype(np.int64)
    order = np.lexsort((predicted_ids, true_ids))
    true_ids, predicted_ids, voxels = true_ids[order], predicted_ids[order], voxels[order]
    is_first = np.ones(len(true_ids), dtype=bool)
    is_first[1:] = (true_ids[1:] != true_ids[:-1]) | (predicted_ids[1:] != predicted_ids[:-1])
    starts = np.flatnonzero(is_first)
    return true_ids[starts], predicted_ids[starts], np.add.reduceat(voxels, starts).astype(np.int64)


def _totals(ids: np.ndarray, voxels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Voxels of each object (id > 0), by ascending id."""
    unique, inverse = np.unique(ids[ids > 0], return_inverse=True)
    totals = np.zeros(len(unique), dtype=np.int64)
    np.add.at(totals, inverse, voxels[ids > 0])
    return unique, totals
