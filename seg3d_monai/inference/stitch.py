"""Stitching: one object, one id, whatever the grid of blocks. This docstring is the rule.

A block predicts on what it reads; only what lies in its owned ROI is painted from it. Neighbours look at the same
voxels twice, and that overlap is the evidence that joins their views (here one axis, blocks A and B, halo h)::

          owned A            |            owned B
    ---------[=====a=========|===]....            a: A's view of the object
             .    [==========|==b===========]---- b: B's view of it
                  <--- h --->|<--- h --->
                  S = read A and read B: both saw these voxels
    painted: [===============|==============]     a up to the face, b behind it, one id

1. *Exclusive views.* Within a block a voxel belongs to the instance with the highest score (ties: the predictor's
   order).
2. *Links.* For two blocks whose read ROIs overlap in S, instances are matched one to one by the IoU of their masks
   within S (the assignment with the greatest sum of IoU), provided that IoU >= `MIN_IOU`. If each view says that the
   object belongs to the other block (its mask lies mostly in the other's owned ROI), neither alone would be kept by
   rule 4, and `MIN_IOU_DEFERRING` is enough.
3. *Groups.* A link joins two instances if both have voxels in their own block's owned ROI: only then the object really
   passes from one block to the other. Chains of links make one object, so a rod through five blocks or a cell larger
   than the halo is one object. Two instances of the same block are never joined: of a chain that would do so the
   weakest links are left out. A link with an instance that has nothing in its own owned ROI joins nothing (such a
   sliver at the rim of a read ROI could join two neighbours), but it says that this block knows the object and gives
   it no voxel.
4. *Trust.* An instance without a partner is kept if its own block owns at least as many of its voxels as any other
   block. Otherwise the block that owns more of it, and saw it with more context, did not report it: it is dropped.
5. *Painting.* In the owned ROI of B an object is B's member of the group. If B has no member and does not know the
   object (see 3), the members that reach into B are painted there as guests. A voxel claimed by a guest and by others
   goes to the highest score (ties: the owner, then block order).
6. *Duplicates.* An object that loses more than half of its voxels to objects of other blocks is the same cell seen
   twice without enough overlap to be linked: it is removed. Where several such objects meet, one yields at a time and
   the others are looked at again.
7. *Ids* count from 1 by the first block that has a member, then by the corner of that member's mask.

An object must be connected (26 neighbours count): parts that no two neighbouring blocks share leave no evidence.
Nothing depends on the order in which blocks were predicted. Blocks are read from the journal pair by pair, only where
they overlap; what is kept for all instances is a few numbers each. This file knows neither predictor nor files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from seg3d_monai.inference.blocks import BlockPlan, Roi, intersection, roi_shape, roi_slices
from seg3d_monai.inference.instances import PlacedInstance

MIN_IOU = 0.2
MIN_IOU_DEFERRING = 0.05
_PRIOR_VOXELS = 8  # a link over a handful of voxels is weaker evidence than its IoU says

Ints = NDArray[np.int64]


class InstanceSource(Protocol):
    """Where the instances of a block are read from (the journal)."""

    def instances(self, block: int, roi: Roi | None = None, min_score: float | None = None) -> list[PlacedInstance]: ...


def label_map(instances: Sequence[PlacedInstance], roi: Roi) -> NDArray[np.int32]:
    """One block's exclusive view of a ROI: number + 1 of the instance with the highest score, 0 where there is none.

    Args:
        instances: instances of one block.
        roi: (z1, y1, x1, z2, y2, x2), volume voxels.
    """
    labels = np.zeros(roi_shape(roi), dtype=np.int32)
    for instance in sorted(instances, key=lambda i: (i.score, -i.number)):
        shared = intersection(instance.roi, roi)
        if shared is not None:
            window = labels[roi_slices(shared, roi[:3])]
            window[instance.mask[roi_slices(shared, instance.roi[:3])]] = instance.number + 1
    return labels


@dataclass(frozen=True)
class Census:
    """A few numbers per instance of the stack; instance `first[block] + number`. Entries that nothing uses hold zeros.

    Attributes:
        first: [blocks + 1] index of each block's first instance.
        block: [N] the block that saw the instance.
        score: [N] its score.
        class_index: [N] its class.
        corner: [N, 3] lower corner of its mask, volume voxels.
        own: [N] voxels of its exclusive mask within its own block's owned ROI.
        home: [N] the block that owns most of its voxels; its own block wins ties, then the lower index.
        reach: [M, 3] rows (instance, other block, voxels of the exclusive mask in that block's owned ROI).
    """

    first: Ints
    block: Ints
    score: NDArray[np.float64]
    class_index: Ints
    corner: Ints
    own: Ints
    home: Ints
    reach: Ints

    def __len__(self) -> int:
        return len(self.block)


def take_census(plan: BlockPlan, source: InstanceSource, *, min_score: float | None, progress: bool) -> Census:
    """Count every instance's voxels by owner, one block at a time."""
    first = np.zeros(len(plan) + 1, dtype=np.int64)
    columns: list[dict[str, NDArray[Any]]] = []
    reach: list[Ints] = []
    for block in tqdm(plan, total=len(plan), desc="count", unit="block", disable=not progress):
        found = source.instances(block.index, min_score=min_score)
        span = max((i.number for i in found), default=-1) + 1
        offset = first[block.index]
        first[block.index + 1] = offset + span
        if span == 0:
            continue
        numbers = np.array([i.number for i in found])
        column: dict[str, NDArray[Any]] = {
            "block": np.full(span, block.index, np.int64),
            "score": np.zeros(span),
            "class_index": np.zeros(span, np.int64),
            "corner": np.zeros((span, 3), np.int64),
            "own": np.zeros(span, np.int64),
            "home": np.full(span, block.index, np.int64),
        }
        column["score"][numbers] = [i.score for i in found]
        column["class_index"][numbers] = [i.class_index for i in found]
        column["corner"][numbers] = [i.roi[:3] for i in found]
        labels = label_map(found, block.read)
        best = np.zeros(span, dtype=np.int64)
        for owner in plan.owners(block.read):
            shared = intersection(plan[owner].owned, block.read)
            assert shared is not None
            counts = np.bincount(labels[roi_slices(shared, block.read[:3])].ravel(), minlength=span + 1)[1:]
            if owner == block.index:
                column["own"] = counts
                continue
            seen = np.flatnonzero(counts)
            reach.append(np.stack([seen + offset, np.full(len(seen), owner), counts[seen]], axis=1))
            column["home"][counts > best] = owner
            np.maximum(best, counts, out=best)
        column["home"][column["own"] >= best] = block.index
        columns.append(column)
    if not columns:
        none = np.zeros(0, np.int64)
        rows = np.zeros((0, 3), np.int64)
        return Census(first, none, np.zeros(0), none, rows, none, none, rows)
    merged = {name: np.concatenate([column[name] for column in columns]) for name in columns[0]}
    return Census(first=first, reach=np.concatenate([*reach, np.zeros((0, 3), np.int64)]), **merged)


@dataclass(frozen=True)
class Links:
    """Pairs of instances of different blocks that are the same object (rule 2).

    Attributes:
        pairs: [L, 2] instances, the one of the lower block first.
        strength: [L] evidence: IoU within the shared ROI, less for a few voxels.
    """

    pairs: Ints
    strength: NDArray[np.float64]


def link_blocks(
    plan: BlockPlan, source: InstanceSource, census: Census, *, min_score: float | None, progress: bool
) -> Links:
    """Match the instances of all pairs of blocks that saw the same voxels."""
    pairs, strength = [np.zeros((0, 2), np.int64)], [np.zeros(0)]
    for block in tqdm(plan, total=len(plan), desc="link", unit="block", disable=not progress):
        if census.first[block.index] == census.first[block.index + 1]:
            continue
        for other in plan.neighbours(block.index):
            if other < block.index or census.first[other] == census.first[other + 1]:
                continue
            found = _link_pair(plan, source, census, block.index, other, min_score)
            pairs.append(found.pairs)
            strength.append(found.strength)
    return Links(pairs=np.concatenate(pairs), strength=np.concatenate(strength))


def _link_pair(
    plan: BlockPlan, source: InstanceSource, census: Census, a: int, b: int, min_score: float | None
) -> Links:
    shared = intersection(plan[a].read, plan[b].read)
    assert shared is not None
    labels_a = label_map(source.instances(a, shared, min_score), shared).ravel()
    labels_b = label_map(source.instances(b, shared, min_score), shared).ravel()
    stride = int(labels_b.max()) + 1
    both = (labels_a > 0) & (labels_b > 0)
    keys, overlap = np.unique(labels_a[both].astype(np.int64) * stride + labels_b[both], return_counts=True)
    in_a, in_b = keys // stride, keys % stride
    union = np.bincount(labels_a)[in_a] + np.bincount(labels_b)[in_b] - overlap
    iou = overlap / union
    first, second = census.first[a] + in_a - 1, census.first[b] + in_b - 1
    deferring = (census.home[first] == b) & (census.home[second] == a)
    enough = np.flatnonzero((iou >= MIN_IOU) | (deferring & (iou >= MIN_IOU_DEFERRING)))
    chosen = enough[_assign(in_a[enough], in_b[enough], iou[enough])]
    strength = overlap[chosen] / (union[chosen] + _PRIOR_VOXELS)
    return Links(pairs=np.stack([first[chosen], second[chosen]], axis=1), strength=strength)


def _assign(rows: Ints, columns: Ints, weight: NDArray[np.float64]) -> Ints:
    """Indices of the one-to-one choice with the greatest sum of weights, ascending."""
    if len(rows) == 0:
        return np.zeros(0, np.int64)
    _, row = np.unique(rows, return_inverse=True)
    _, column = np.unique(columns, return_inverse=True)
    column = column + row.max() + 1
    size = int(column.max()) + 1
    _, part = connected_components(coo_array((np.ones(len(row)), (row, column)), shape=(size, size)), directed=False)
    part_of_edge = part[row]
    chosen: list[int] = []
    order = np.argsort(part_of_edge, kind="stable")
    for edges in np.split(order, np.flatnonzero(np.diff(part_of_edge[order])) + 1):
        if len(edges) == 1:
            chosen.append(int(edges[0]))
            continue
        _, i = np.unique(row[edges], return_inverse=True)
        _, j = np.unique(column[edges], return_inverse=True)
        gain = np.zeros((i.max() + 1, j.max() + 1))
        gain[i, j] = weight[edges]
        edge_at = np.full(gain.shape, -1)
        edge_at[i, j] = edges
        picked = edge_at[linear_sum_assignment(gain, maximize=True)]
        chosen.extend(int(e) for e in picked if e >= 0)
    return np.sort(np.array(chosen, dtype=np.int64))


def group_instances(census: Census, links: Links) -> Ints:
    """Group of every instance (rules 3 and 4): its lowest member, or -1 if the instance is dropped."""
    count = len(census)
    joins = (census.own[links.pairs] > 0).all(axis=1)
    pairs, strength = links.pairs[joins], links.strength[joins]
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, part = connected_components(graph, directed=False)
    order = np.lexsort((census.block, part))
    same = (np.diff(part[order]) == 0) & (np.diff(census.block[order]) == 0)
    crowded = np.unique(part[order][1:][same])
    root = np.full(int(part.max(initial=-1)) + 1, count, dtype=np.int64)
    np.minimum.at(root, part, np.arange(count))
    group = root[part]
    if len(crowded):
        inside = np.isin(part[pairs[:, 0]], crowded)
        members = np.flatnonzero(np.isin(part, crowded))
        group[members] = members
        _join_strongest_first(group, census.block, pairs[inside], strength[inside])
    sizes = np.bincount(group, minlength=count)
    trusted = (sizes[group] > 1) | (census.home == census.block)
    return np.where(trusted & (census.own > 0), group, -1)


def _join_strongest_first(group: Ints, block: Ints, pairs: Ints, strength: NDArray[np.float64]) -> None:
    """Join pairs in place by falling strength, but never two instances of one block."""
    members: dict[int, dict[int, int]] = {}  # group -> {block: instance}
    for index in np.lexsort((pairs[:, 1], pairs[:, 0], -strength)):
        a, b = (int(group[i]) for i in pairs[index])
        if a == b:
            continue
        of_a = members.setdefault(a, {int(block[a]): a})
        of_b = members.setdefault(b, {int(block[b]): b})
        if of_a.keys() & of_b.keys():
            continue
        low, high = min(a, b), max(a, b)
        members[low] = of_a | of_b
        for instance in members.pop(high).values():
            group[instance] = low


def find_guests(census: Census, links: Links, group: Ints) -> dict[int, Ints]:
    """Instances painted in a block that is not theirs (rule 5), by block, ascending."""
    reach = census.reach[group[census.reach[:, 0]] >= 0]
    if len(reach) == 0:
        return {}
    # A block answers for an object if it has a member in the group, or a linked instance without a voxel of its own.
    kept = np.flatnonzero(group >= 0)
    answers = [np.stack([group[kept], census.block[kept]], axis=1)]
    for mine, theirs in ((0, 1), (1, 0)):
        known = (group[links.pairs[:, mine]] >= 0) & (census.own[links.pairs[:, theirs]] == 0)
        pairs = links.pairs[known]
        answers.append(np.stack([group[pairs[:, mine]], census.block[pairs[:, theirs]]], axis=1))
    stride = len(census.first)
    answered = np.unique(np.concatenate(answers) @ np.array([stride, 1]))
    keys = group[reach[:, 0]] * stride + reach[:, 1]
    open_rows = ~np.isin(keys, answered)
    keys, instances = keys[open_rows], reach[open_rows, 0]
    guests: dict[int, list[int]] = {}
    for key, instance in zip(keys, instances, strict=True):
        guests.setdefault(int(key % stride), []).append(int(instance))
    return {block: np.array(sorted(found)) for block, found in sorted(guests.items())}
