"""From groups to voxels: rules 5 to 7 of `stitch` (painting, duplicates across blocks, ids).

`stitch_blocks` runs the whole rule and returns a `Stitched` stack, which paints any block's owned ROI on request, in
any order. This file knows neither predictor nor files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from seg3d_monai.inference.blocks import BlockPlan, Roi, intersection, roi_slices
from seg3d_monai.inference.stitch import (
    Census,
    InstanceSource,
    Ints,
    find_guests,
    group_instances,
    label_map,
    link_blocks,
    take_census,
)


@dataclass(frozen=True)
class Stitched:
    """A stitched stack: who belongs to which object, and how to paint it.

    Attributes:
        plan: the plan of blocks.
        source: where instances are read from.
        census: numbers per instance.
        guests: instances painted in a block that is not theirs, by block.
        object_id: [N] id of every instance's object, from 1; 0 for dropped ones.
        scores: [objects] score of the member that has most of its voxels in its own owned ROI.
        classes: [objects] class of that member.
        min_score: instances below it do not exist.
    """

    plan: BlockPlan
    source: InstanceSource
    census: Census
    guests: dict[int, Ints]
    object_id: Ints
    scores: NDArray[np.float64]
    classes: Ints
    min_score: float | None

    @property
    def num_objects(self) -> int:
        """How many objects the stack holds."""
        return len(self.scores)

    def paint(self, block: int) -> Ints:
        """Object ids over a block's owned ROI, 0 = background."""
        return _paint(
            self.plan, self.source, self.census, self.guests, self.object_id, block=block, min_score=self.min_score
        )[1]


def stitch_blocks(
    plan: BlockPlan, source: InstanceSource, *, min_score: float | None = None, progress: bool = False
) -> Stitched:
    """Join the instances of all blocks into objects; the rule is the docstring of `stitch`.

    Args:
        plan: the plan of blocks.
        source: gives the instances of every block.
        min_score: ignore instances with a lower score.
        progress: show progress bars.
    """
    census = take_census(plan, source, min_score=min_score, progress=progress)
    links = link_blocks(plan, source, census, min_score=min_score, progress=progress)
    group = group_instances(census, links)
    guests = find_guests(census, links, group)
    group = _remove_duplicates(plan, source, census, guests, group, min_score=min_score, progress=progress)
    object_id, scores, classes = _number_objects(census, group)
    return Stitched(
        plan=plan,
        source=source,
        census=census,
        guests=guests,
        object_id=object_id,
        scores=scores,
        classes=classes,
        min_score=min_score,
    )


def _paint(
    plan: BlockPlan,
    source: InstanceSource,
    census: Census,
    guests: dict[int, Ints],
    value: Ints,
    *,
    block: int,
    min_score: float | None,
) -> tuple[Ints, Ints]:
    """Values (0 = nothing) over a block's owned ROI: of its own instances, and of all after guests have competed."""
    roi = plan[block].owned
    first = census.first
    labels = label_map(source.instances(block, roi, min_score), roi)
    own = np.concatenate([[0], value[first[block] : first[block + 1]]])[labels]
    visitors = [int(i) for i in guests.get(block, ()) if value[i] > 0]
    if not visitors:
        return own, own
    score = np.concatenate([[-np.inf], census.score[first[block] : first[block + 1]]])[labels]
    score[own == 0] = -np.inf
    painted = own.copy()
    view = _GuestViews(plan, source, census, block, min_score)
    for visitor in sorted(visitors, key=lambda i: (-census.score[i], i)):
        window, mask = view(visitor)
        wins = mask & (census.score[visitor] > score[window])
        painted[window][wins] = value[visitor]
        score[window][wins] = census.score[visitor]
    return own, painted


class _GuestViews:
    """Where the instances of other blocks lie in a block's owned ROI: a window of it, and the exclusive mask there."""

    def __init__(
        self, plan: BlockPlan, source: InstanceSource, census: Census, block: int, min_score: float | None
    ) -> None:
        self._plan, self._source, self._census, self._min_score = plan, source, census, min_score
        self._roi = plan[block].owned
        self._maps: dict[int, tuple[Roi, NDArray[np.int32]]] = {}

    def __call__(self, instance: int) -> tuple[tuple[slice, slice, slice], NDArray[np.bool_]]:
        other = int(self._census.block[instance])
        if other not in self._maps:
            shared = intersection(self._plan[other].read, self._roi)
            assert shared is not None
            self._maps[other] = (shared, label_map(self._source.instances(other, shared, self._min_score), shared))
        shared, labels = self._maps[other]
        return roi_slices(shared, self._roi[:3]), labels == instance - self._census.first[other] + 1


def _remove_duplicates(
    plan: BlockPlan,
    source: InstanceSource,
    census: Census,
    guests: dict[int, Ints],
    group: Ints,
    *,
    min_score: float | None,
    progress: bool,
) -> Ints:
    """Drop the groups that lose more than half of their voxels to groups of other blocks (rule 6)."""
    count = len(census)
    group = group.copy()
    alive = np.flatnonzero(group >= 0)
    claimed = np.bincount(group[alive], weights=census.own[alive], minlength=count).astype(np.int64)
    score = np.full(count, -np.inf)
    np.maximum.at(score, group[alive], census.score[alive])
    losses: dict[int, Ints] = {}  # block -> rows (group, group that hides it, voxels)
    stale, first_round = list(guests), True
    while stale:
        for block in tqdm(stale, desc="settle", unit="block", disable=not progress):
            claims, losses[block] = _contest(plan, source, census, guests, group, block, min_score)
            if first_round:
                np.add.at(claimed, claims[:, 0], claims[:, 1])
        first_round = False
        rows = np.concatenate(list(losses.values()))
        total = np.bincount(rows[:, 0], weights=rows[:, 2], minlength=count)
        failing = np.flatnonzero((2 * total > claimed) & (claimed > 0))
        hidden_by: dict[int, set[int]] = {int(g): set() for g in failing}
        for loser, hider, _ in rows[np.isin(rows[:, 0], failing)]:
            hidden_by[int(loser)].add(int(hider))
        # What hides a group may yield itself, then the group is visible again: so it waits for the next round.
        yielding: set[int] = set()
        waiting: set[int] = set()
        for g in sorted(hidden_by, key=lambda g: (-score[g], g)):
            (yielding if hidden_by[g].isdisjoint(yielding | waiting) else waiting).add(g)
        gone = np.array(sorted(yielding), dtype=np.int64)
        claimed[gone] = 0
        stale = [b for b, rows in losses.items() if np.isin(rows[:, :2], gone).any()]
        group[np.isin(group, gone)] = -1
    return group


def _contest(
    plan: BlockPlan,
    source: InstanceSource,
    census: Census,
    guests: dict[int, Ints],
    group: Ints,
    block: int,
    min_score: float | None,
) -> tuple[Ints, Ints]:
    """One block's rows (group, voxels that its guests cover) and rows (group, group that hides it, voxels)."""
    own, painted = _paint(plan, source, census, guests, group + 1, block=block, min_score=min_score)
    hidden = (own > 0) & (own != painted)
    pairs, counts = np.unique(np.stack([own[hidden], painted[hidden]], axis=1), axis=0, return_counts=True)
    losses = [np.column_stack([pairs - 1, counts])]
    claims: list[tuple[int, int]] = []
    view = _GuestViews(plan, source, census, block, min_score)
    present = guests[block][group[guests[block]] >= 0]
    for name in np.unique(group[present]):
        covered = np.zeros(own.shape, dtype=np.bool_)
        for guest in present[group[present] == name]:
            window, mask = view(int(guest))
            covered[window] |= mask
        hiders, counts = np.unique(painted[covered], return_counts=True)
        claims.append((int(name), int(counts.sum())))
        others = hiders != name + 1
        losses.append(np.column_stack([np.full(others.sum(), name), hiders[others] - 1, counts[others]]))
    return np.array(claims, dtype=np.int64).reshape(-1, 2), np.concatenate(losses)


def _number_objects(census: Census, group: Ints) -> tuple[Ints, NDArray[np.float64], Ints]:
    """Compact ids (rule 7), and the score and class of each object."""
    object_id = np.zeros(len(group), dtype=np.int64)
    alive = np.flatnonzero(group >= 0)
    roots = np.unique(group[alive])  # a group is named after its lowest member, which lies in its first block
    z, y, x = census.corner[roots].T
    ordered = roots[np.lexsort((roots, x, y, z, census.block[roots]))]
    rank = np.zeros(len(group), dtype=np.int64)
    rank[ordered] = np.arange(1, len(ordered) + 1)
    object_id[alive] = rank[group[alive]]
    by_view = alive[np.lexsort((alive, -census.own[alive], object_id[alive]))]
    _, leading = np.unique(object_id[by_view], return_index=True)
    leaders = by_view[leading]
    return object_id, census.score[leaders], census.class_index[leaders]
