"""From groups to voxels: rules 5 to 7 of `stitch` (painting, duplicates across blocks, ids).

`stitch_blocks` runs the whole rule and returns a `Stitched` stack, which paints any block's owned ROI on request, in
any order. This file knows neither predictor nor files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from seg3d_monai.inference.blocks import BlockPlan, Roi, intersection, roi_shape, roi_slices
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
        )


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
) -> Ints:
    """Values (0 = nothing) of the instances over a block's owned ROI; guests compete with the owner by score."""
    roi = plan[block].owned
    first = census.first
    labels = label_map(source.instances(block, roi, min_score), roi)
    lookup = np.concatenate([[0], value[first[block] : first[block + 1]]])
    painted = lookup[labels]
    visitors = [int(i) for i in guests.get(block, ()) if value[i] > 0]
    if not visitors:
        return painted
    score = np.concatenate([[-np.inf], census.score[first[block] : first[block + 1]]])[labels]
    score[painted == 0] = -np.inf
    view = _GuestViews(plan, source, census, block, min_score)
    for visitor in sorted(visitors, key=lambda i: (-census.score[i], i)):
        window, mask = view(visitor)
        wins = mask & (census.score[visitor] > score[window])
        painted[window][wins] = value[visitor]
        score[window][wins] = census.score[visitor]
    return painted


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
    alive = group >= 0
    claimed = np.bincount(group[alive], weights=census.own[alive], minlength=count).astype(np.int64)
    claimed_by_guest: dict[int, tuple[Ints, Ints]] = {}
    for block, found in guests.items():
        claimed_by_guest[block] = _guest_claims(plan, source, census, group, block, found, min_score)
        np.add.at(claimed, *claimed_by_guest[block])
    score = np.full(count, -np.inf)
    np.maximum.at(score, group[alive], census.score[alive])
    lost = {}  # block -> (groups, voxels they claim there and do not get)
    stale = list(guests)
    while stale:
        for block in tqdm(stale, desc="settle", unit="block", disable=not progress):
            lost[block] = _losses(plan, source, census, guests, group, claimed_by_guest[block], block, min_score)
        total = np.zeros(count, dtype=np.int64)
        for groups, voxels in lost.values():
            np.add.at(total, groups, voxels)
        failing = np.flatnonzero(2 * total > claimed)
        where: dict[int, list[int]] = {int(g): [] for g in failing}
        for block, (groups, _) in lost.items():
            for g in groups[np.isin(groups, failing)]:
                where[int(g)].append(block)
        # What hides a group may yield itself: of groups that meet in a block one yields at a time, highest score first.
        touched: set[int] = set()
        for g in sorted(where, key=lambda g: (-score[g], g)):
            if touched.isdisjoint(where[g]):
                group[group == g] = -1
                claimed[g] = 0
            touched.update(where[g])
        stale = sorted(touched)
    return group


def _losses(
    plan: BlockPlan,
    source: InstanceSource,
    census: Census,
    guests: dict[int, Ints],
    group: Ints,
    claimed_by_guest: tuple[Ints, Ints],
    block: int,
    min_score: float | None,
) -> tuple[Ints, Ints]:
    painted = _paint(plan, source, census, guests, group + 1, block=block, min_score=min_score)
    groups, got = np.unique(painted, return_counts=True)
    visible = dict(zip((groups - 1).tolist(), got.tolist(), strict=True))
    own = np.arange(census.first[block], census.first[block + 1])
    groups = np.concatenate([group[own], claimed_by_guest[0]])
    claims = np.concatenate([census.own[own], claimed_by_guest[1]])
    alive = (groups >= 0) & (group[groups] >= 0)
    groups, claims = groups[alive], claims[alive]
    losses = claims - np.array([visible.get(int(g), 0) for g in groups], dtype=np.int64)
    return groups[losses > 0], losses[losses > 0]


def _guest_claims(
    plan: BlockPlan,
    source: InstanceSource,
    census: Census,
    group: Ints,
    block: int,
    guests: Ints,
    min_score: float | None,
) -> tuple[Ints, Ints]:
    """(groups, voxels that their guests cover in a block's owned ROI, each voxel once)."""
    view = _GuestViews(plan, source, census, block, min_score)
    groups = np.unique(group[guests])
    claims = np.zeros(len(groups), dtype=np.int64)
    for index, name in enumerate(groups):
        covered = np.zeros(roi_shape(plan[block].owned), dtype=np.bool_)
        for guest in guests[group[guests] == name]:
            window, mask = view(int(guest))
            covered[window] |= mask
        claims[index] = np.count_nonzero(covered)
    return groups, claims


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
