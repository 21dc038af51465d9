"""What one block's prediction says for stitching: whose voxels its instances hold, and which neighbours' they match.

Rules 1 and 2 of `stitch`. A block's evidence needs its own instances and those of the neighbours before it, nothing
else, so it is worked out while other blocks are predicted and kept in the journal. Must not know files or predictors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from seg3d_monai.inference.blocks import BlockPlan, Roi, intersection, roi_shape, roi_slices
from seg3d_monai.inference.instances import PlacedInstance
from seg3d_monai.ops import label_extents, label_pairs

MIN_IOU = 0.2
MIN_IOU_DEFERRING = 0.05
PRIOR_VOXELS = 8
"""A link over a handful of voxels is weaker evidence than its IoU says."""

Ints = NDArray[np.int64]


class InstanceSource(Protocol):
    """Where the instances of a block are read from: the journal, or some of its rows."""

    def instances(self, block: int, roi: Roi | None = None, min_score: float | None = None) -> list[PlacedInstance]:
        """Those of a block that meet a ROI, all without one, of at least a score."""


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
    """A few numbers for each instance of a block, by its number; entries that nothing uses hold zeros.

    Attributes:
        score: float64 [n].
        class_index: int32 [n].
        corner: int32 [n, 3] lower corner of the mask, volume voxels.
        own: int32 [n] voxels of the exclusive mask within the block's owned ROI.
        home: int64 [n] the block that owns most of its voxels; its own block wins ties, then the lower index.
        reach: int64 [m, 2] rows (number, other block that owns a voxel of its exclusive mask).
    """

    score: NDArray[np.float64]
    class_index: NDArray[np.int32]
    corner: NDArray[np.int32]
    own: NDArray[np.int32]
    home: Ints
    reach: Ints

    def __len__(self) -> int:
        return len(self.score)


@dataclass(frozen=True)
class Links:
    """Instances of a block that neighbours before it saw as well.

    Attributes:
        other: int64 [l] the neighbour.
        theirs: int32 [l] number of its instance.
        mine: int32 [l] number of the block's instance.
        strength: float64 [l] IoU within the ROI that both read, less for a few voxels.
    """

    other: Ints
    theirs: NDArray[np.int32]
    mine: NDArray[np.int32]
    strength: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.other)


def take_census(plan: BlockPlan, block: int, instances: Sequence[PlacedInstance]) -> Census:
    """Count the voxels of a block's instances by owner.

    Args:
        plan: the plan of blocks.
        block: index of the block.
        instances: all of its instances that exist.
    """
    span = max((i.number for i in instances), default=-1) + 1
    census = Census(
        score=np.zeros(span),
        class_index=np.zeros(span, np.int32),
        corner=np.zeros((span, 3), np.int32),
        own=np.zeros(span, np.int32),
        home=np.full(span, block, np.int64),
        reach=np.zeros((0, 2), np.int64),
    )
    if span == 0:
        return census
    numbers = np.array([i.number for i in instances])
    census.score[numbers] = [i.score for i in instances]
    census.class_index[numbers] = [i.class_index for i in instances]
    census.corner[numbers] = [i.roi[:3] for i in instances]
    read = plan[block].read
    labels = label_map(instances, read)
    best = np.zeros(span, np.int64)
    reach = []
    for owner in plan.owners(plan[block]):
        shared = intersection(plan[owner].owned, read)
        assert shared is not None
        counts = label_extents(torch.from_numpy(labels[roi_slices(shared, read[:3])]), span).voxels.numpy()
        if owner == block:
            census.own[:] = counts
            continue
        seen = np.flatnonzero(counts)
        reach.append(np.stack([seen, np.full(len(seen), owner)], axis=1))
        census.home[counts > best] = owner
        np.maximum(best, counts, out=best)
    census.home[census.own >= best] = block
    return Census(**arrays_of(census) | {"reach": np.concatenate([census.reach, *reach])})


def link_block(
    plan: BlockPlan,
    block: int,
    source: InstanceSource,
    homes: Mapping[int, Ints],
    min_score: float | None = None,
) -> Links:
    """Match a block's instances with those of the neighbours before it.

    Args:
        plan: the plan of blocks.
        block: index of the block.
        source: gives the instances of the block and of these neighbours.
        homes: `Census.home` of the block and of these neighbours; those without an instance may be missing.
        min_score: ignore instances with a lower score.
    """
    found = [Links(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0))]
    if len(homes.get(block, ())):
        before = [other for other in plan.neighbours(block) if other < block and len(homes.get(other, ()))]
        found += [_link_pair(plan, other, block, source, homes, min_score) for other in before]
    parts = [arrays_of(links) for links in found]
    return Links(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _link_pair(
    plan: BlockPlan, a: int, b: int, source: InstanceSource, homes: Mapping[int, Ints], min_score: float | None
) -> Links:
    shared = intersection(plan[a].read, plan[b].read)
    assert shared is not None
    labels_a = label_map(source.instances(a, shared, min_score), shared)
    labels_b = label_map(source.instances(b, shared, min_score), shared)
    in_a, in_b, voxels = count_pairs(labels_a, labels_b)
    size_a, size_b = np.bincount(in_a, voxels), np.bincount(in_b, voxels)
    both = (in_a > 0) & (in_b > 0)
    in_a, in_b, overlap = in_a[both], in_b[both], voxels[both]
    union = size_a[in_a] + size_b[in_b] - overlap
    iou = overlap / union
    theirs, mine = in_a - 1, in_b - 1
    deferring = (homes[a][theirs] == b) & (homes[b][mine] == a)
    enough = np.flatnonzero((iou >= MIN_IOU) | (deferring & (iou >= MIN_IOU_DEFERRING)))
    chosen = enough[_assign(theirs[enough], mine[enough], iou[enough])]
    return Links(
        other=np.full(len(chosen), a, np.int64),
        theirs=theirs[chosen].astype(np.int32),
        mine=mine[chosen].astype(np.int32),
        strength=overlap[chosen] / (union[chosen] + PRIOR_VOXELS),
    )


def count_pairs(a: NDArray[np.int32], b: NDArray[np.int32]) -> tuple[Ints, Ints, Ints]:
    """Which pairs of labels share voxels, and how many, background included; ordered by a, then b.

    Args:
        a: labels of any shape, 0 = background.
        b: the same voxels in another view.

    Returns:
        Labels of a, labels of b, numbers of voxels, [pairs] each.
    """
    flat = (1, 1, -1) if a.ndim != 3 else a.shape
    pairs, counts = label_pairs(torch.from_numpy(a.reshape(flat)), torch.from_numpy(b.reshape(flat)))
    return pairs[:, 0].numpy(), pairs[:, 1].numpy(), counts.numpy()


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
    order = np.argsort(part_of_edge, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(part_of_edge[order])) + 1)
    chosen: list[int] = []
    for edges in groups:
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


def arrays_of(record: Any) -> dict[str, NDArray[Any]]:
    """The arrays of a dataclass of arrays, by name."""
    return {field.name: getattr(record, field.name) for field in fields(record)}
