"""Which cells a result has split, merged or lost, and which of them lie on a seam."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class CellErrors:
    """What became of each true cell.

    Cells are the ids of the truth, objects those of the result. An object *covers* a cell if it holds more than half of
    the cell's voxels, the rule by which the Cell Tracking Challenge matches objects to true cells (Matula et al., PLoS
    ONE 2015); a cell is covered by one object at most. An object *lies in* a cell if more than half of the object's own
    voxels are the cell's. A cell is

    - *merged* if the object that covers it covers another cell too;
    - *split* if two or more objects lie in it, however small they are;
    - *lost* if it is not split and no object covers it.

    So a cell cut into halves is split and not also lost, and a cell that is merged and of which a fragment remains is
    both merged and split; such a cell counts once in `wrong`. It is a *seam cell* if it has voxels on both sides of a
    face between two blocks' owned ROIs, whatever its share on either side.

    Attributes:
        ids: [N] ids of the cells.
        split: [N] bool.
        merged: [N] bool.
        lost: [N] bool.
        is_seam: [N] bool.
    """

    ids: NDArray[np.int64]
    split: Bools
    merged: Bools
    lost: Bools
    is_seam: Bools

    @property
    def wrong(self) -> Bools:
        """[N], any of the errors."""
        return self.split | self.merged | self.lost

    def counts(self) -> dict[str, dict[str, int]]:
        """Numbers of cells and of each error, of the seam cells ("seam") and of all others ("away")."""
        return {
            place: {
                "cells": int(chosen.sum()),
                **{kind: int((getattr(self, kind) & chosen).sum()) for kind in ("split", "merged", "lost", "wrong")},
            }
            for place, chosen in (("seam", self.is_seam), ("away", ~self.is_seam))
        }


def cell_errors(truth: NDArray[np.integer], labels: NDArray[np.integer], block_size: Sequence[int]) -> CellErrors:
    """Compare a result with the truth, cell by cell.

    Args:
        truth: [Z, Y, X], ids of the cells, 0 = background.
        labels: [Z, Y, X], ids of the objects, 0 = background.
        block_size: (z, y, x) of the owned grid, which begins at the volume's first voxel.
    """
    cell, found, shared = _overlaps(truth, labels)
    cell_size, object_size = np.bincount(truth.ravel()), np.bincount(labels.ravel())
    is_real = (cell > 0) & (found > 0)
    cell, found, shared = cell[is_real], found[is_real], shared[is_real]
    lies_in = 2 * shared > object_size[found]
    covers = 2 * shared > cell_size[cell]
    num_inside = np.bincount(cell[lies_in], minlength=len(cell_size))
    num_covered = np.bincount(found[covers], minlength=len(object_size))
    covered, merged = np.zeros((2, len(cell_size)), dtype=np.bool_)
    covered[cell[covers]] = True
    merged[cell[covers]] = num_covered[found[covers]] > 1
    split = num_inside > 1
    is_seam = np.zeros(len(cell_size), dtype=np.bool_)
    for index, box in enumerate(find_objects(truth), start=1):
        if box is not None:
            is_seam[index] = any(
                side.start // size != (side.stop - 1) // size for side, size in zip(box, block_size, strict=True)
            )
    ids = np.flatnonzero(cell_size)
    ids = ids[ids > 0]
    return CellErrors(ids, split[ids], merged[ids], (~split & ~covered)[ids], is_seam[ids])


def num_inexact(truth: NDArray[np.integer], labels: NDArray[np.integer]) -> int:
    """How many cells have no object of exactly their voxels, and objects no cell of exactly theirs."""
    cell, found, shared = _overlaps(truth, labels)
    cell_size, object_size = np.bincount(truth.ravel()), np.bincount(labels.ravel())
    is_exact = (cell > 0) & (found > 0) & (shared == cell_size[cell]) & (shared == object_size[found])
    num_things = np.count_nonzero(cell_size[1:]) + np.count_nonzero(object_size[1:])
    return int(num_things - 2 * np.count_nonzero(is_exact))


def _overlaps(
    truth: NDArray[np.integer], labels: NDArray[np.integer]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pairs (id in truth, id in labels, voxels that have both), 0 among the ids."""
    stride = int(labels.max(initial=0)) + 1
    keys, shared = np.unique(truth.ravel().astype(np.int64) * stride + labels.ravel(), return_counts=True)
    return keys // stride, keys % stride, shared
