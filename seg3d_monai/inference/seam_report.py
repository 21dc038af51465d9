"""The report of a seam check: how many cells differ next to faces and away from them, as text and as JSON.

Rates come with their 95 % intervals. This file knows cells (seam_cells.py), not how they were found.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import binomtest

from seg3d_monai.inference.blocks import Roi, Triple
from seg3d_monai.inference.seam_cells import KINDS, Cell

Interval = tuple[float, float]


@dataclass(frozen=True)
class Tally:
    """Cells of one group and how many of them are of each kind.

    Attributes:
        num_cells: all cells of the group.
        num_split, num_merged, num_mixed, num_lost, num_moved: those on which the answers disagree, by kind.
    """

    num_cells: int
    num_split: int = 0
    num_merged: int = 0
    num_mixed: int = 0
    num_lost: int = 0
    num_moved: int = 0

    @classmethod
    def of(cls, cells: Sequence[Cell]) -> Tally:
        """Count cells."""
        counts = Counter(cell.kind for cell in cells)
        return cls(len(cells), *(counts[kind] for kind in KINDS))

    @property
    def num_disagreeing(self) -> int:
        """Cells of any kind but "same"."""
        return self.num_split + self.num_merged + self.num_mixed + self.num_lost + self.num_moved

    @property
    def rate(self) -> float | None:
        """Share of the cells on which the answers disagree; None without cells."""
        return self.num_disagreeing / self.num_cells if self.num_cells else None

    @property
    def rate_interval(self) -> Interval | None:
        """95 % interval of the rate (Wilson 1927); None without cells."""
        if not self.num_cells:
            return None
        interval = binomtest(self.num_disagreeing, self.num_cells).proportion_ci(method="wilson")
        return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class SeamReport:
    """What `seam_check` found.

    Attributes:
        roi: the region, volume voxels.
        block_size: (z, y, x) of a block, voxels.
        halo: (z, y, x), voxels.
        offsets: (z, y, x) of a grid line, of the first and of the second grid, voxels.
        spacing_um: (z, y, x) micrometer per voxel, or None.
        min_iou: least IoU of a cell that has not moved.
        max_shift: greatest shift of a cell that has not moved; None for half the radius of a ball of its volume.
        num_objects: objects in the first and in the second answer, cut ones included.
        num_cut: cells that are not counted because the region's border cuts them.
        at_faces: the counts of the cells at a face of either grid.
        away: the counts of the cells away from any face: the model's own variation.
        disagreements: the counted cells that are not the same, those at faces first, by kind, then by place.
    """

    roi: Roi
    block_size: Triple
    halo: Triple
    offsets: tuple[Triple, Triple]
    spacing_um: tuple[float, float, float] | None
    min_iou: float
    max_shift: float | None
    num_objects: tuple[int, int]
    num_cut: int
    at_faces: Tally
    away: Tally
    disagreements: tuple[Cell, ...]

    @property
    def excess(self) -> float | None:
        """The rate at faces less the rate away from them; None if one group has no cell."""
        if self.at_faces.rate is None or self.away.rate is None:
            return None
        return self.at_faces.rate - self.away.rate

    @property
    def excess_interval(self) -> Interval | None:
        """95 % interval of the excess (Newcombe 1998, method 10); a seam is likely if it lies above 0."""
        at_faces, away = self.at_faces, self.away
        if at_faces.rate is None or away.rate is None:
            return None
        assert at_faces.rate_interval is not None
        assert away.rate_interval is not None
        (low, high), (away_low, away_high) = at_faces.rate_interval, away.rate_interval
        excess = at_faces.rate - away.rate
        return (
            excess - float(np.hypot(at_faces.rate - low, away_high - away.rate)),
            excess + float(np.hypot(high - at_faces.rate, away.rate - away_low)),
        )

    def as_json(self) -> dict[str, Any]:
        """The report as JSON-able values; rates and intervals are null where a group has no cell."""
        facts = asdict(self)
        for name, tally in (("at_faces", self.at_faces), ("away", self.away)):
            facts[name] |= {
                "num_disagreeing": tally.num_disagreeing,
                "rate": tally.rate,
                "rate_interval": tally.rate_interval,
            }
        disagreements = facts.pop("disagreements")
        facts |= {"excess": self.excess, "excess_interval": self.excess_interval, "disagreements": disagreements}
        return dict(json.loads(json.dumps(facts)))

    def __str__(self) -> str:
        region = ", ".join(f"{axis} {self.roi[a]}:{self.roi[a + 3]}" for a, axis in enumerate("zyx"))
        lines = [
            f"{self.num_objects[0]} and {self.num_objects[1]} objects in {region}, blocks of {self.block_size} voxels, "
            f"grid lines at {self.offsets[0]} and {self.offsets[1]}",
            f"{'':<16}{'cells':>8}" + "".join(f"{kind:>8}" for kind in KINDS) + f"{'differ':>10}  95 % interval",
        ]
        for name, tally in (("at a face", self.at_faces), ("away from faces", self.away)):
            counts = [tally.num_split, tally.num_merged, tally.num_mixed, tally.num_lost, tally.num_moved]
            shown = "".join(f"{count:>8}" for count in (tally.num_cells, *counts))
            lines.append(f"{name:<16}{shown}{_percent(tally.rate):>10}  {_range(tally.rate_interval)}")
        if self.excess is None:
            lines.append("one of the groups has no cell: nothing can be said about seams; check a larger region")
        else:
            # Moved cells are the model's own wobble, which may hide or feign a small excess of broken ones.
            at_faces, away = (replace(tally, num_moved=0) for tally in (self.at_faces, self.away))
            unmoved = replace(self, at_faces=at_faces, away=away)
            for name, report in (("excess at faces", self), ("excess without moved", unmoved)):
                lines.append(f"{name}: {_percent(report.excess)}, 95 % interval {_range(report.excess_interval)}")
        if self.num_cut:
            lines.append(f"{self.num_cut} cells at the border of the region are not counted")
        return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _range(interval: Interval | None) -> str:
    return "-" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"
