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
Nothing depends on the order in which blocks were predicted. Rules 1 and 2 are `evidence`, of one block each; rules 3
and 4, here, need a few numbers for each instance of the stack and each link, about 100 bytes together; rules 5 to 7 are
`paint`. This file knows neither predictor nor files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from seg3d_monai.inference.evidence import Census, Ints, Links

Index = NDArray[np.integer]
_LINKS_AT_A_TIME = 2**22
_PARTS = 16


@dataclass
class Records:
    """A few numbers for each instance of the stack; instance `first[block] + number`.

    Instances are int32 where they can be.

    Attributes:
        first: int64 [blocks + 1] index of each block's first instance.
        block: int32 [N] the block that saw the instance.
        score: float64 [N] its score.
        class_index: int32 [N] its class.
        corner: int32 [N, 3] lower corner of its mask, volume voxels.
        own: int32 [N] voxels of its exclusive mask within its own block's owned ROI.
        at_home: bool [N] whether no other block owns more of its voxels.
        reaching: int [M] an instance with voxels in a ROI that another block owns, and
        reached: int32 [M] this block.
        lower: int [L] an instance of a block, and
        higher: int [L] the one of a later block that is the same object (rule 2).
        strength: float32 [L] evidence for it.
    """

    first: Ints
    block: NDArray[np.int32]
    score: NDArray[np.float64]
    class_index: NDArray[np.int32]
    corner: NDArray[np.int32]
    own: NDArray[np.int32]
    at_home: NDArray[np.bool_]
    reaching: Index
    reached: NDArray[np.int32]
    lower: Index
    higher: Index
    strength: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.block)

    def of_block(self, block: int) -> slice:
        """The instances of a block."""
        return slice(int(self.first[block]), int(self.first[block + 1]))

    def drop_evidence(self) -> None:
        """Give back the memory of what tells groups and guests, once they are known."""
        self.reaching = self.lower = self.higher = np.zeros(0, self.lower.dtype)
        self.reached, self.strength = np.zeros(0, np.int32), np.zeros(0, np.float32)


def gather_records(
    num_blocks: int, counts: Iterable[tuple[int, int, int, int]], evidence: Iterable[tuple[int, Census, Links]]
) -> Records:
    """Put the evidence of all blocks together, each array once in memory.

    Args:
        num_blocks: blocks of the plan.
        counts: (block, instances, reach rows, links) of every block that has evidence.
        evidence: (block, census, links) of the same blocks, ascending.
    """
    sizes = np.zeros((num_blocks + 1, 3), np.int64)
    for block, *numbers in counts:
        sizes[block + 1] = numbers
    first, first_reach, first_link = np.cumsum(sizes, axis=0).T
    num_instances, num_reach, num_links = int(first[-1]), int(first_reach[-1]), int(first_link[-1])
    index = np.int32 if num_instances < np.iinfo(np.int32).max else np.int64
    records = Records(
        first=np.ascontiguousarray(first),
        block=np.repeat(np.arange(num_blocks, dtype=np.int32), np.diff(first)),
        score=np.zeros(num_instances),
        class_index=np.zeros(num_instances, np.int32),
        corner=np.zeros((num_instances, 3), np.int32),
        own=np.zeros(num_instances, np.int32),
        at_home=np.zeros(num_instances, np.bool_),
        reaching=np.zeros(num_reach, index),
        reached=np.zeros(num_reach, np.int32),
        lower=np.zeros(num_links, index),
        higher=np.zeros(num_links, index),
        strength=np.zeros(num_links, np.float32),
    )
    for block, census, links in evidence:
        mine = records.of_block(block)
        records.score[mine] = census.score
        records.class_index[mine] = census.class_index
        records.corner[mine] = census.corner
        records.own[mine] = census.own
        records.at_home[mine] = census.home == block
        reach = slice(int(first_reach[block]), int(first_reach[block + 1]))
        records.reaching[reach] = first[block] + census.reach[:, 0]
        records.reached[reach] = census.reach[:, 1]
        link = slice(int(first_link[block]), int(first_link[block + 1]))
        records.lower[link] = first[links.other] + links.theirs
        records.higher[link] = first[block] + links.mine
        records.strength[link] = links.strength
    return records


def group_instances(records: Records) -> Ints:
    """Group of every instance (rules 3 and 4): its lowest member, or -1 if the instance is dropped."""
    count = len(records)
    joins = (records.own[records.lower] > 0) & (records.own[records.higher] > 0)
    part = _connected(count, records.lower, records.higher, joins)
    order = np.lexsort((records.block, part))
    same = (np.diff(part[order]) == 0) & (np.diff(records.block[order]) == 0)
    crowded = np.unique(part[order][1:][same])
    del order, same
    root = np.full(int(part.max(initial=-1)) + 1, count, dtype=np.int64)
    np.minimum.at(root, part, np.arange(count))
    group = root[part]
    del root
    if len(crowded):
        is_crowded = np.isin(part, crowded)
        inside = np.flatnonzero(joins & is_crowded[records.lower])
        members = np.flatnonzero(is_crowded)
        group[members] = members
        pairs = np.stack([records.lower[inside], records.higher[inside]], axis=1)
        _join_strongest_first(group, records.block, pairs, records.strength[inside])
    sizes = np.bincount(group, minlength=count)
    trusted = ((sizes[group] > 1) | records.at_home) & (records.own > 0)
    group[~trusted] = -1
    return group


def _connected(count: int, a: Index, b: Index, joins: NDArray[np.bool_]) -> Index:
    """The part of each of `count` nodes when those pairs that join do; some pairs at a time, to bound the memory."""
    part: Index = np.arange(count, dtype=np.int32 if count < np.iinfo(np.int32).max else np.int64)
    for start in range(0, len(a), _LINKS_AT_A_TIME):
        some = slice(start, start + _LINKS_AT_A_TIME)
        rows, columns = part[a[some][joins[some]]], part[b[some][joins[some]]]
        graph = coo_array((np.ones(len(rows), np.bool_), (rows, columns)), shape=(count, count))
        part = connected_components(graph, directed=False)[1][part]
    return part


def _join_strongest_first(group: Ints, block: NDArray[np.int32], pairs: Index, strength: NDArray[np.float32]) -> None:
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


def find_guests(records: Records, group: Ints) -> dict[int, Ints]:
    """Instances painted in a block that is not theirs (rule 5), by block, ascending."""
    guests: dict[int, list[int]] = {}
    num_blocks = len(records.first) - 1
    known = [
        np.flatnonzero((group[mine] >= 0) & (records.own[theirs] == 0))
        for mine, theirs in ((records.lower, records.higher), (records.higher, records.lower))
    ]
    for part in range(_PARTS):
        start, stop = part * num_blocks // _PARTS, (part + 1) * num_blocks // _PARTS
        rows = np.flatnonzero((records.reached >= start) & (records.reached < stop))
        rows = rows[group[records.reaching[rows]] >= 0]
        instances, blocks = records.reaching[rows], records.reached[rows]
        if len(rows) == 0:
            continue
        # A block answers for an object by a member of the group, or by a linked instance without a voxel of its own.
        stride = np.int64(num_blocks)
        members = np.arange(records.first[start], records.first[stop])
        members = members[group[members] >= 0]
        answers = [group[members] * stride + records.block[members]]
        for links, mine, theirs in zip(
            known, (records.lower, records.higher), (records.higher, records.lower), strict=True
        ):
            of_links = records.block[theirs[links]]
            here = links[(of_links >= start) & (of_links < stop)]
            answers.append(group[mine[here]] * stride + records.block[theirs[here]])
        is_open = ~np.isin(group[instances] * stride + blocks, np.concatenate(answers))
        for block, instance in zip(blocks[is_open].tolist(), instances[is_open].tolist(), strict=True):
            guests.setdefault(block, []).append(instance)
    return {block: np.array(sorted(found)) for block, found in sorted(guests.items())}
