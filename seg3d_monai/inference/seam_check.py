"""Does stitching leave seams? One region is predicted under two grids of blocks, and the two answers are compared.

The second grid is the first one moved by half a block, so a face of one runs through the middle of the other's blocks.
A model that sees other surroundings answers a little differently anywhere; what stitching adds shows as a higher rate
of disagreement next to faces than away from them. No annotation is needed. These are the words of the report:

*Cell.* Objects of the two answers that share more than half of the voxels of the smaller one belong together; a cell is
all objects that are joined so, usually one of each answer. Every object is in exactly one cell. The IoU of a cell is
that of all voxels of its first answer with all voxels of its second one.

*Lost.* The IoU of the cell is below `LOST_IOU`: one answer has no object there, or only a piece of it.
*Split.* One object of the first answer is two or more in the second. *Merged.* The reverse. *Mixed.* Several in both.
*Moved.* One object in both, but their IoU is below `min_iou` or their centroids are further apart than `max_shift`.
*Same.* Neither of these. A cell has one of the six kinds, the first that fits in this order.

*At a face.* An object of the cell has a voxel next to a face between two blocks of either grid. *Away.* None has.
*Cut.* An object of the cell reaches the border of the region where the volume goes on: it is not counted.

This file knows label arrays and grids; it takes the model as a callable.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import binomtest
from skimage.measure import regionprops_table

from seg3d_monai.inference.blocks import BlockPlan, Roi, Triple
from seg3d_monai.inference.inputs import open_input
from seg3d_monai.inference.predict import DEFAULT_BLOCK_SIZE, DEFAULT_HALO, plan_blocks, predict_plan
from seg3d_monai.inference.workers import Predictor

KINDS = ("split", "merged", "mixed", "lost", "moved")
SAME = "same"
LOST_IOU = 0.3
DEFAULT_MIN_IOU = 0.5
REGION_BLOCKS = 3

Faces = tuple[Sequence[int], Sequence[int], Sequence[int]]
Interval = tuple[float, float]


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


def seam_check(
    image: Any,
    predictor: Predictor,
    *,
    block_size: int | Sequence[int] = DEFAULT_BLOCK_SIZE,
    halo: int | Sequence[int] = DEFAULT_HALO,
    roi: Sequence[int] | None = None,
    offset: int | Sequence[int] = 0,
    axes: str | None = None,
    spacing: Sequence[float] | None = None,
    channels: Sequence[int] | int | None = None,
    min_iou: float = DEFAULT_MIN_IOU,
    max_shift: float | None = None,
    json_path: str | os.PathLike[str] | None = None,
    picture_path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SeamReport:
    """Predict a region under two grids of blocks and report where the two answers disagree.

    An axis along which one block holds the whole volume has no seam, and its grid is not moved.

    Args:
        image: path of a stack, a volume, or an array [Z, Y, X] or [C, Z, Y, X].
        predictor: as in `predict_volume`; it must give the same answer for the same block.
        block_size: int or (z, y, x) voxels, as it will be used on the whole stack.
        halo: int or (z, y, x) voxels, likewise.
        roi: (z1, y1, x1, z2, y2, x2) to predict, volume voxels; None for 3 x 3 x 3 blocks in the middle.
        offset: int or (z, y, x) voxels of a line of the first grid.
        axes: axes of the stored array, if its metadata do not say; for paths only.
        spacing: (z, y, x) micrometer per voxel; for paths and arrays only.
        channels: channels to read; for paths only.
        min_iou: a cell with a lower IoU counts as moved; from `LOST_IOU` to 1.
        max_shift: a cell whose centroid differs by more counts as moved, micrometer (voxels if the spacing is
            unknown), more than 0; None for half the radius of a ball of its volume.
        json_path: where to write the report as JSON; its folder must exist.
        picture_path: where to write a PNG of the place with the most disagreements; its folder must exist.
        progress: show progress bars.

    Returns:
        The report.

    Raises:
        FileNotFoundError: if the image or a folder to write to does not exist.
        ValueError: if an argument is out of its range, no face lies in the region, the volume holds NaN or the
            predictor returns invalid instances.
        TypeError: if an argument has the wrong type or the predictor does not return Instances.
    """
    for name, path in (("json_path", json_path), ("picture_path", picture_path)):
        if path is not None and not Path(path).parent.is_dir():
            raise FileNotFoundError(f"the folder of {name} {path} does not exist; make {Path(path).parent} first")
    _check_limits(min_iou, max_shift)
    volume = open_input(image, axes=axes, spacing=spacing, channels=channels)
    whole = plan_blocks(volume, predictor, block_size, halo, offset=offset)
    region = _middle(whole) if roi is None else roi
    half = [size // 2 if size < extent else 0 for size, extent in zip(whole.block_size, whole.shape, strict=True)]
    plans = [
        BlockPlan.make(shape=whole.shape, block_size=whole.block_size, halo=whole.halo, roi=region, offset=lines)
        for lines in (whole.offset, tuple(o + h for o, h in zip(whole.offset, half, strict=True)))
    ]
    faces = [_faces(plan) for plan in plans]
    if not any(along for grid in faces for along in grid):
        raise ValueError(
            f"no face between two blocks lies in the region {list(plans[0].region)} with block_size "
            f"{list(whole.block_size)}, so there is no seam; pass a smaller block_size or a larger roi"
        )
    first, second = (predict_plan(plan, volume, predictor, progress)[0] for plan in plans)
    plan = plans[0]
    cells = compare_labels(
        first,
        second,
        faces=_joined(faces[0], faces[1]),
        origin=plan.region[:3],
        spacing=volume.spacing_um,
        goes_on=[r > 0 for r in plan.region[:3]] + [r < n for r, n in zip(plan.region[3:], plan.shape, strict=True)],
        min_iou=min_iou,
        max_shift=max_shift,
    )
    counted = [cell for cell in cells if not cell.is_cut]
    report = SeamReport(
        roi=plan.region,
        block_size=plan.block_size,
        halo=plan.halo,
        offsets=(plan.offset, plans[1].offset),
        spacing_um=volume.spacing_um,
        min_iou=min_iou,
        max_shift=max_shift,
        num_objects=(int(first.max()), int(second.max())),
        num_cut=len(cells) - len(counted),
        at_faces=Tally.of([cell for cell in counted if cell.at_face]),
        away=Tally.of([cell for cell in counted if not cell.at_face]),
        disagreements=tuple(
            sorted(
                (cell for cell in counted if cell.kind != SAME),
                key=lambda cell: (not cell.at_face, KINDS.index(cell.kind), cell.box),
            )
        ),
    )
    if json_path is not None:
        Path(json_path).write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
    if picture_path is not None:
        from seg3d_monai.inference.seam_picture import save_picture  # matplotlib takes long to import

        save_picture(Path(picture_path), volume, first, second, faces, report)
    return report


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
    _check_limits(min_iou, max_shift)
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


def _faces(plan: BlockPlan) -> Faces:
    """Along each axis, where a block begins behind another one."""
    z, y, x = (sorted({block.owned[axis] for block in plan} - {plan.region[axis]}) for axis in range(3))
    return z, y, x


def _joined(first: Faces, second: Faces) -> Faces:
    z, y, x = (sorted({*a, *b}) for a, b in zip(first, second, strict=True))
    return z, y, x


def _middle(plan: BlockPlan) -> Roi:
    """The blocks in the middle of the volume, `REGION_BLOCKS` along each axis that has so many."""
    lower, upper = [], []
    for extent, size, offset in zip(plan.shape, plan.block_size, plan.offset, strict=True):
        room = extent - REGION_BLOCKS * size
        line = offset + (room // 2 - offset) // size * size if room > 0 else 0
        lower.append(max(line, 0))
        upper.append(min(line + REGION_BLOCKS * size, extent))
    return lower[0], lower[1], lower[2], upper[0], upper[1], upper[2]


def _check_limits(min_iou: float, max_shift: float | None) -> None:
    if not LOST_IOU <= min_iou <= 1:
        raise ValueError(f"min_iou is {min_iou}; pass a number from {LOST_IOU}, below which a cell is lost, to 1")
    if max_shift is not None and not max_shift > 0:
        raise ValueError(f"max_shift is {max_shift}; pass micrometers more than 0, or None for half a radius")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _range(interval: Interval | None) -> str:
    return "-" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"
