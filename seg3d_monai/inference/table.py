"""The object table: one row per object, counted while blocks are painted, written as Parquet or CSV.

All sums are integers, so the table is the same in whatever order blocks are added. This file knows label arrays only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from seg3d_monai.inference.blocks import Roi


class ObjectCounter:
    """Volume, extent and centroid of every object, gathered block by block.

    Args:
        num_objects: ids run from 1 to this.
    """

    def __init__(self, num_objects: int) -> None:
        self._voxels = np.zeros(num_objects, dtype=np.int64)
        self._sums = np.zeros((num_objects, 3), dtype=np.int64)
        self._lower = np.full((num_objects, 3), np.iinfo(np.int64).max, dtype=np.int64)
        self._upper = np.zeros((num_objects, 3), dtype=np.int64)

    def add(self, labels: NDArray[np.integer], roi: Roi) -> None:
        """Count a painted ROI.

        Args:
            labels: [d, h, w] ids, 0 = background.
            roi: where it lies, volume voxels.
        """
        inside = labels > 0
        ids, compact = np.unique(labels[inside], return_inverse=True)
        if len(ids) == 0:
            return
        rows = ids.astype(np.int64) - 1
        local = np.zeros(labels.shape, dtype=np.int32)
        local[inside] = compact + 1
        count = np.bincount(compact, minlength=len(ids))
        self._voxels[rows] += count
        for axis, coordinate in enumerate(np.nonzero(inside)):
            sums = np.bincount(compact, weights=coordinate, minlength=len(ids)).astype(np.int64)
            self._sums[rows, axis] += sums + count * roi[axis]
        found = ndimage.find_objects(local)
        lower = np.array([[s.start for s in box] for box in found]) + np.array(roi[:3])
        upper = np.array([[s.stop for s in box] for box in found]) + np.array(roi[:3])
        self._lower[rows] = np.minimum(self._lower[rows], lower)
        self._upper[rows] = np.maximum(self._upper[rows], upper)

    def table(
        self,
        *,
        scores: NDArray[np.floating],
        classes: NDArray[np.integer],
        shape: Sequence[int],
        spacing_um: Sequence[float] | None,
    ) -> pd.DataFrame:
        """The table of all objects.

        Args:
            scores: [objects].
            classes: [objects].
            shape: (Z, Y, X) of the volume.
            spacing_um: (z, y, x) of a voxel in micrometers, or None if unknown (then the `_um` columns are null).

        Returns:
            Columns id, score, class, z1 .. x2 (exact extent, half-open), centroid_* (mean index of its voxels),
            centroid_*_um (centroid_* times the spacing), volume_voxels, volume_um3, touches_border.
        """
        spacing = np.full(3, np.nan) if spacing_um is None else np.asarray(spacing_um, dtype=np.float64)
        assert (self._voxels > 0).all(), "an id without a voxel"
        centroid = self._sums / self._voxels[:, None]
        columns: dict[str, NDArray] = {
            "id": np.arange(1, len(self._voxels) + 1, dtype=np.int64),
            "score": np.asarray(scores, dtype=np.float64),
            "class": np.asarray(classes, dtype=np.int64),
        }
        columns |= {f"{axis}1": self._lower[:, a] for a, axis in enumerate("zyx")}
        columns |= {f"{axis}2": self._upper[:, a] for a, axis in enumerate("zyx")}
        columns |= {f"centroid_{axis}": centroid[:, a] for a, axis in enumerate("zyx")}
        columns |= {f"centroid_{axis}_um": centroid[:, a] * spacing[a] for a, axis in enumerate("zyx")}
        columns["volume_voxels"] = self._voxels
        columns["volume_um3"] = self._voxels * spacing.prod()
        columns["touches_border"] = ((self._lower == 0) | (self._upper == np.asarray(shape))).any(axis=1)
        return pd.DataFrame(columns)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write the table whole or not at all; the suffix (.parquet or .csv) chooses the format."""
    partial = path.with_name(path.name + ".partial")
    if path.suffix == ".parquet":
        table.to_parquet(partial, index=False, engine="pyarrow")
    else:
        table.to_csv(partial, index=False, lineterminator="\n")
    partial.replace(path)
