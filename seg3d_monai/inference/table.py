"""The object table: one row per object, from counts of every painted block, written as Parquet or CSV.

All sums are integers, so the table is the same in whatever order blocks are painted. This file knows label arrays and
the geometry of blocks only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from seg3d_monai.inference.blocks import BlockPlan, Roi
from seg3d_monai.ops import label_extents

FORMATS = ("parquet", "csv")
_ROWS = 2**16  # of a row group: small beside a block of voxels


@dataclass(frozen=True)
class ObjectCounts:
    """What one painted block holds of each object.

    Attributes:
        ids: int64 [n], ascending.
        voxels: int64 [n].
        sums: int64 [n, 3] sum of the voxels' indices (z, y, x) in the volume.
        lower: int32 [n, 3] lower corner of the extent, volume voxels.
        upper: int32 [n, 3] upper corner, half-open.
    """

    ids: NDArray[np.int64]
    voxels: NDArray[np.int64]
    sums: NDArray[np.int64]
    lower: NDArray[np.int32]
    upper: NDArray[np.int32]


def count_objects(slots: NDArray[np.int32], ids: NDArray[np.int64], roi: Roi) -> ObjectCounts:
    """Count a painted ROI.

    Args:
        slots: int32 [d, h, w] index into `ids`.
        ids: ascending; `ids[0]` is 0, background.
        roi: where it lies, volume voxels.
    """
    extents = label_extents(torch.from_numpy(slots), len(ids) - 1)
    present = np.flatnonzero(extents.voxels.numpy())
    voxels, sums, lower, upper = (column.numpy()[present] for column in extents)
    origin = np.array(roi[:3])
    return ObjectCounts(
        ids=ids[present + 1],
        voxels=voxels,
        sums=sums + voxels[:, None] * origin,
        lower=(lower + origin).astype(np.int32),
        upper=(upper + origin).astype(np.int32),
    )


class ObjectTotals:
    """Counts of whole objects, gathered from blocks: 60 bytes an object.

    Args:
        plan: the plan of blocks.
        num_objects: ids run from 1 to this.
    """

    def __init__(self, plan: BlockPlan, num_objects: int) -> None:
        self._plan = plan
        self._voxels = np.zeros(num_objects, dtype=np.int64)
        self._sums = np.zeros((num_objects, 3), dtype=np.int64)
        self._lower = np.full((num_objects, 3), np.iinfo(np.int32).max, dtype=np.int32)
        self._upper = np.zeros((num_objects, 3), dtype=np.int32)
        self._time = np.zeros(num_objects, dtype=np.int32)

    def add(self, block: int, counts: ObjectCounts) -> None:
        """Add what a block holds."""
        rows = counts.ids - 1
        self._voxels[rows] += counts.voxels
        self._sums[rows] += counts.sums
        self._lower[rows] = np.minimum(self._lower[rows], counts.lower)
        self._upper[rows] = np.maximum(self._upper[rows], counts.upper)
        self._time[rows] = block // self._plan.blocks_per_time

    def tables(
        self,
        *,
        scores: NDArray[np.floating],
        classes: NDArray[np.integer],
        spacing_um: Sequence[float] | None,
        times: Sequence[int] | None = None,
    ) -> Iterator[pd.DataFrame]:
        """The table of all objects, in parts of 65,536 rows, at least one part.

        Args:
            scores: [objects].
            classes: [objects].
            spacing_um: (z, y, x) of a voxel in micrometers, or None if unknown (then the `_um` columns are null).
            times: the time points of a series.

        Yields:
            Columns id, time (of a series only), score, class, z1 .. x2 (exact extent, half-open), centroid_* (mean
            index of its voxels), centroid_*_um (centroid_* times the spacing), volume_voxels, volume_um3,
            touches_border (of the predicted region), seen_whole (whether one block read all of its extent; where not,
            it is larger than the halo and was joined from parts).
        """
        spacing = np.full(3, np.nan) if spacing_um is None else np.asarray(spacing_um, dtype=np.float64)
        assert (self._voxels > 0).all(), "an id without a voxel"
        low, high = np.array(self._plan.region[:3]), np.array(self._plan.region[3:])
        for start in range(0, max(1, len(self._voxels)), _ROWS):
            part = slice(start, min(start + _ROWS, len(self._voxels)))
            voxels, lower, upper = self._voxels[part], self._lower[part], self._upper[part]
            centroid = self._sums[part] / voxels[:, None]
            columns: dict[str, NDArray] = {"id": np.arange(part.start + 1, part.stop + 1, dtype=np.int64)}
            if times is not None:
                columns["time"] = np.asarray(times, np.int64)[self._time[part]]
            columns["score"] = np.asarray(scores[part], dtype=np.float64)
            columns["class"] = np.asarray(classes[part], dtype=np.int64)
            columns |= {f"{axis}1": lower[:, a].astype(np.int64) for a, axis in enumerate("zyx")}
            columns |= {f"{axis}2": upper[:, a].astype(np.int64) for a, axis in enumerate("zyx")}
            columns |= {f"centroid_{axis}": centroid[:, a] for a, axis in enumerate("zyx")}
            columns |= {f"centroid_{axis}_um": centroid[:, a] * spacing[a] for a, axis in enumerate("zyx")}
            columns["volume_voxels"] = voxels
            columns["volume_um3"] = voxels * spacing.prod()
            columns["touches_border"] = ((lower == low) | (upper == high)).any(axis=1)
            columns["seen_whole"] = seen_whole(self._plan, lower, upper)
            yield pd.DataFrame(columns)


def seen_whole(plan: BlockPlan, lower: NDArray[np.integer], upper: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Whether some block's read ROI holds a whole extent.

    Args:
        plan: the plan of blocks.
        lower: [n, 3] lower corners, volume voxels.
        upper: [n, 3] upper corners, half-open.

    Returns:
        bool [n].
    """
    whole = np.ones(len(lower), np.bool_)
    for axis in range(3):
        size, halo = plan.block_size[axis], plan.halo[axis]
        line = plan.offset[axis] + plan.first[axis] * size
        # The last block whose read ROI begins at or before the extent reaches furthest.
        last = np.clip((lower[:, axis].astype(np.int64) + halo - line) // size, 0, plan.grid[axis] - 1)
        end = np.minimum(line + (last + 1) * size, plan.region[axis + 3])
        whole &= upper[:, axis] <= np.minimum(end + halo, plan.shape[axis])
    return whole


def write_table(tables: Iterable[pd.DataFrame], path: Path) -> None:
    """Write the parts of a table whole or not at all; the suffix (.parquet or .csv) chooses the format.

    Args:
        tables: at least one part, all of the same columns.
        path: the file.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        _write_parts(tables, partial, path.suffix)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_parts(tables: Iterable[pd.DataFrame], file: Path, suffix: str) -> None:
    if suffix == ".parquet":
        writer: pq.ParquetWriter | None = None
        try:
            for table in tables:
                rows = pa.Table.from_pandas(table, preserve_index=False)
                writer = writer or pq.ParquetWriter(file, rows.schema)
                writer.write_table(rows)
        finally:
            if writer is not None:
                writer.close()
    else:
        with file.open("w", newline="") as text:
            for number, table in enumerate(tables):
                table.to_csv(text, index=False, header=number == 0, lineterminator="\n")
