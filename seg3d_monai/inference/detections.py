"""From what a network found in a block to instances: which detections count, and the voxels of each.

A prediction and the search for its settings both go through this file, so that what was found good for the one holds
for the other. Must not know the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from seg3d_monai.inference.blocks import roi_slices
from seg3d_monai.inference.crowding import Found
from seg3d_monai.inference.flips import merge_views
from seg3d_monai.inference.instances import Instances
from seg3d_monai.inference.mask_paste import PlacedMask, placed_masks


@dataclass(frozen=True, kw_only=True)
class InstanceSettings:
    """Which detections count, and where their masks end.

    Args:
        score_threshold: least score of an instance.
        mask_threshold: probability at which a voxel belongs to an instance.
        min_voxels: least number of voxels of an instance's mask.
        min_visible: least share of its mask that no instance with a higher score covers; those with less are second
            views of the same cell, as in Panoptic FPN (Kirillov et al. 2019).

    Raises:
        ValueError: one of them is out of its range.
    """

    score_threshold: float = 0.5
    mask_threshold: float = 0.5
    min_voxels: int = 1
    min_visible: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.mask_threshold < 1:
            raise ValueError(f"mask_threshold is {self.mask_threshold}; give a probability between 0 and 1")
        if not 0 <= self.score_threshold <= 1:
            raise ValueError(f"score_threshold is {self.score_threshold}; give a score in 0 to 1")
        if self.min_voxels < 0:
            raise ValueError(f"min_voxels is {self.min_voxels}; give 0 or more")
        if not 0 <= self.min_visible <= 1:
            raise ValueError(f"min_visible is {self.min_visible}; give a share in 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Detections:
    """What the network found in one block, from which instances follow under any settings.

    Args:
        views: {"boxes", "scores", "classes", "mask_logits"} of each view of the block, in its frame; see `merge_views`.
        size: (d, h, w) voxels of the block as the network saw it.
        restore: brings instances to the voxels of the stack, where the network saw others.
    """

    views: Sequence[Found]
    size: tuple[int, ...]
    restore: Callable[[Instances], Instances] | None = None

    def instances(self, settings: InstanceSettings) -> Instances:
        """The instances under these settings, by descending score."""
        masked = self.masked(settings.score_threshold, settings.mask_threshold)
        return masked.instances(settings.min_voxels, settings.min_visible)

    @torch.inference_mode()
    def masked(self, score_threshold: float, mask_threshold: float) -> MaskedDetections:
        """The detections of at least a score, by descending score, and their masks.

        Raises:
            ValueError: a box is not finite.
        """
        found = merge_views(self.views, score_threshold=score_threshold, mask_threshold=mask_threshold)
        scores = found["scores"].tolist()
        by_score = found["scores"].argsort(descending=True, stable=True).tolist()
        rows = [i for i in by_score if scores[i] >= score_threshold]
        logits, boxes = found["mask_logits"], found["boxes"].float()[rows]
        grids = logits[rows] if isinstance(logits, Tensor) else [logits[i] for i in rows]
        return MaskedDetections(
            boxes=boxes,
            scores=found["scores"][rows],
            classes=found["classes"][rows],
            masks=placed_masks(grids, boxes, mask_threshold),
            size=self.size,
            restore=self.restore,
        )


@dataclass(frozen=True, kw_only=True)
class MaskedDetections:
    """Detections by descending score, with the voxels of each.

    Whether one of them becomes an instance depends on those before it alone: instances of at least a higher score are
    the first ones of this list.

    Args:
        boxes: [N, 6], voxels.
        scores: [N], descending.
        classes: [N].
        masks: N masks.
        size: (d, h, w) voxels of the block.
        restore: as of `Detections`.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    masks: Sequence[PlacedMask]
    size: tuple[int, ...]
    restore: Callable[[Instances], Instances] | None = None

    def instances(self, min_voxels: int, min_visible: float) -> Instances:
        """Those that are large and visible enough; see `InstanceSettings`."""
        masks, kept = [], []
        claimed = np.zeros(self.size, dtype=bool)
        for i, (roi, mask) in enumerate(self.masks):
            voxels = np.count_nonzero(mask)
            if voxels < min_voxels:
                continue
            if min_visible > 0:
                window = claimed[roi_slices(roi)]
                if np.count_nonzero(mask & ~window) < min_visible * voxels:
                    continue
                window |= mask
            masks.append(mask)
            kept.append(i)
        found = Instances(
            boxes=self.boxes[kept].numpy(),
            scores=self.scores[kept].numpy(),
            classes=self.classes[kept].numpy(),
            masks=masks,
        )
        return found if self.restore is None else self.restore(found)
