"""From groups to voxels: rules 5 to 7 of `stitch` (painting, duplicates across blocks, ids).

`stitch_records` runs the rules and returns a `Stitched` stack, which knows who claims voxels of any block's owned ROI;
`paint_block` paints it, in any order and in any process. This file knows neither predictor nor files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from seg3d_monai.inference.blocks import BlockPlan, Roi, intersection, roi_slices
from seg3d_monai.inference.evidence import InstanceSource, Ints, count_pairs, label_map
from seg3d_monai.inference.stitch import Records, find_guests, group_instances


@dataclass(frozen=True)
class Visitor:
    """An instance that is painted in a block that is not its own.

    Attributes:
        block: its own block.
        number: its number there.
        value: what is painted.
        score: its score.
    """

    block: int
    number: int
    value: int
    score: float


@dataclass(frozen=True)
class Claims:
    """Who claims voxels of a block's owned ROI.

    Attributes:
        block: index of the block.
        values: int64 [n] what its own instances paint, by number; 0 for nothing.
        scores: float64 [n] their scores.
        visitors: instances of other blocks, the strongest first.
    """

    block: int
    values: Ints
    scores: NDArray[np.float64]
    visitors: tuple[Visitor, ...]


@dataclass(frozen=True)
class Painted:
    """A painted owned ROI.

    Attributes:
        values: int64 [s] the values that occur in the claims, ascending; `values[0]` is 0, background.
        own: int32 [d, h, w] index into `values` of what the block's own instances paint.
        slots: int32 [d, h, w] the same after visitors have competed.
    """

    values: Ints
    own: NDArray[np.int32]
    slots: NDArray[np.int32]


def paint_block(plan: BlockPlan, source: InstanceSource, claims: Claims, min_score: float | None = None) -> Painted:
    """Paint a block's owned ROI.

    Args:
        plan: the plan of blocks.
        source: gives the instances of the block and of its visitors' blocks.
        claims: who claims its voxels.
        min_score: instances below it do not exist.
    """
    roi = plan[claims.block].owned
    labels = label_map(source.instances(claims.block, roi, min_score), roi)
    visiting = np.array([visitor.value for visitor in claims.visitors], np.int64)
    values = np.unique(np.concatenate([[0], claims.values, visiting]))
    slot_of = np.concatenate([[0], np.searchsorted(values, claims.values)]).astype(np.int32)
    own = slot_of[labels]
    if not claims.visitors:
        return Painted(values, own, own)
    # The strongest visitor comes first, so no other takes what a visitor has: the last score stands for all of them.
    score = np.concatenate([[-np.inf], np.where(claims.values > 0, claims.scores, -np.inf), [np.inf]])
    slots = own.copy()
    views = _Views(plan, source, roi, min_score)
    for visitor, slot in zip(claims.visitors, np.searchsorted(values, visiting).tolist(), strict=True):
        window, wins = views.of(visitor)
        wins[wins] = visitor.score > score[labels[window][wins]]
        slots[window][wins] = slot
        labels[window][wins] = len(score) - 1
    return Painted(values, own, slots)


@dataclass(frozen=True)
class Stitched:
    """A stitched stack: who belongs to which object.

    Attributes:
        records: numbers for each instance.
        guests: instances painted in a block that is not theirs, by block.
        object_id: int64 [N] id of every instance's object, from 1; 0 for dropped ones.
        scores: float64 [objects] score of the member that has most of its voxels in its own owned ROI.
        classes: int32 [objects] class of that member.
    """

    records: Records
    guests: dict[int, Ints]
    object_id: Ints
    scores: NDArray[np.float64]
    classes: NDArray[np.int32]

    @property
    def num_objects(self) -> int:
        """How many objects the stack holds."""
        return len(self.scores)

    def painted_blocks(self) -> list[int]:
        """Blocks in which an object may be painted, ascending."""
        own = np.unique(self.records.block[(self.object_id > 0) & (self.records.own > 0)])
        visited = [block for block, guests in self.guests.items() if (self.object_id[guests] > 0).any()]
        return sorted({*own.tolist(), *visited})

    def claims(self, block: int) -> Claims:
        """Who claims voxels of a block's owned ROI, by object id."""
        return _claims(self.records, self.guests, self.object_id, block)


def stitch_records(
    plan: BlockPlan,
    source: InstanceSource,
    records: Records,
    *,
    min_score: float | None = None,
    min_volume: int = 0,
    progress: bool = False,
) -> Stitched:
    """Join the instances of all blocks into objects; the rule is the docstring of `stitch`.

    Args:
        plan: the plan of blocks.
        source: gives the instances of every block.
        records: what `gather_records` gave; loses what tells groups and guests.
        min_score: instances below it do not exist.
        min_volume: objects with fewer voxels are left out; what they covered goes to those behind them.
        progress: show a progress bar.
    """
    group = group_instances(records)
    guests = find_guests(records, group)
    records.drop_evidence()
    group, volume = _remove_duplicates(plan, source, records, guests, group, min_score=min_score, progress=progress)
    if min_volume > 0:
        alive = np.flatnonzero(group >= 0)
        group[alive[volume[group[alive]] < min_volume]] = -1
    return Stitched(records, guests, *_number_objects(records, group))


def _claims(records: Records, guests: dict[int, Ints], value: Ints, block: int) -> Claims:
    mine = records.of_block(block)
    visitors = [int(i) for i in guests.get(block, ()) if value[i] > 0]
    return Claims(
        block=block,
        values=value[mine],
        scores=records.score[mine],
        visitors=tuple(
            Visitor(
                block=int(records.block[i]),
                number=i - int(records.first[records.block[i]]),
                value=int(value[i]),
                score=float(records.score[i]),
            )
            for i in sorted(visitors, key=lambda i: (-records.score[i], i))
        ),
    )


class _Views:
    """Where the instances of other blocks lie in an owned ROI: a window of it, and the exclusive mask there."""

    def __init__(self, plan: BlockPlan, source: InstanceSource, roi: Roi, min_score: float | None) -> None:
        self._plan, self._source, self._roi, self._min_score = plan, source, roi, min_score
        self._maps: dict[int, tuple[Roi, NDArray[np.int32]]] = {}

    def of(self, visitor: Visitor) -> tuple[tuple[slice, slice, slice], NDArray[np.bool_]]:
        if visitor.block not in self._maps:
            shared = intersection(self._plan[visitor.block].read, self._roi)
            assert shared is not None
            instances = self._source.instances(visitor.block, shared, self._min_score)
            self._maps[visitor.block] = (shared, label_map(instances, shared))
        shared, labels = self._maps[visitor.block]
        return roi_slices(shared, self._roi[:3]), labels == visitor.number + 1


def _remove_duplicates(
    plan: BlockPlan,
    source: InstanceSource,
    records: Records,
    guests: dict[int, Ints],
    group: Ints,
    *,
    min_score: float | None,
    progress: bool,
) -> tuple[Ints, Ints]:
    """Drop the groups that lose more than half of their voxels to groups of other blocks (rule 6).

    Returns:
        The groups that are left, and the number of voxels that each paints, by its lowest member.
    """
    count = len(records)
    group = group.copy()
    alive = np.flatnonzero(group >= 0)
    claimed = np.zeros(count, np.int64)
    np.add.at(claimed, group[alive], records.own[alive])
    if not guests:
        return group, claimed
    score = np.full(count, -np.inf)
    np.maximum.at(score, group[alive], records.score[alive])
    losses: dict[int, Ints] = {}  # block -> rows (group, group that hides it, voxels)
    stale, first_round = list(guests), True
    while stale:
        for block in tqdm(stale, desc="settle", unit="block", disable=not progress):
            claims, losses[block] = _contest(plan, source, records, guests, group, block, min_score)
            if first_round:
                np.add.at(claimed, claims[:, 0], claims[:, 1])
        first_round = False
        rows = np.concatenate(list(losses.values()))
        total = np.zeros(count, np.int64)
        np.add.at(total, rows[:, 0], rows[:, 2])
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
    return group, claimed - total


def _contest(
    plan: BlockPlan,
    source: InstanceSource,
    records: Records,
    guests: dict[int, Ints],
    group: Ints,
    block: int,
    min_score: float | None,
) -> tuple[Ints, Ints]:
    """One block's rows (group, voxels that its guests cover) and rows (group, group that hides it, voxels)."""
    claims = _claims(records, guests, group + 1, block)
    painted = paint_block(plan, source, claims, min_score)
    names = painted.values - 1
    hidden = (painted.own > 0) & (painted.own != painted.slots)
    losers, hiders, counts = count_pairs(painted.own[hidden], painted.slots[hidden])
    losses = [np.column_stack([names[losers], names[hiders], counts])]
    covers: list[tuple[int, int]] = []
    views = _Views(plan, source, plan[block].owned, min_score)
    for value in sorted({visitor.value for visitor in claims.visitors}):
        covered = np.zeros(painted.slots.shape, dtype=np.bool_)
        for visitor in claims.visitors:
            if visitor.value == value:
                window, mask = views.of(visitor)
                covered[window] |= mask
        hiders, counts = np.unique(painted.slots[covered], return_counts=True)
        covers.append((value - 1, int(counts.sum())))
        others = painted.values[hiders] != value
        losses.append(np.column_stack([np.full(others.sum(), value - 1), names[hiders[others]], counts[others]]))
    return np.array(covers, dtype=np.int64).reshape(-1, 2), np.concatenate(losses)


def _number_objects(records: Records, group: Ints) -> tuple[Ints, NDArray[np.float64], NDArray[np.int32]]:
    """Compact ids (rule 7), and the score and class of each object."""
    object_id = np.zeros(len(group), dtype=np.int64)
    alive = np.flatnonzero(group >= 0)
    roots = np.unique(group[alive])  # a group is named after its lowest member, which lies in its first block
    z, y, x = records.corner[roots].T
    ordered = roots[np.lexsort((roots, x, y, z, records.block[roots]))]
    rank = np.zeros(len(group), dtype=np.int64)
    rank[ordered] = np.arange(1, len(ordered) + 1)
    object_id[alive] = rank[group[alive]]
    del rank, ordered
    by_view = alive[np.lexsort((alive, -records.own[alive], object_id[alive]))]
    _, leading = np.unique(object_id[by_view], return_index=True)
    leaders = by_view[leading]
    return object_id, records.score[leaders], records.class_index[leaders]
