"""Test-time flips: which views of an image there are, and one set of detections from those of all views.

Must not know the network: detections are {"boxes", "scores", "classes", "mask_logits"} in the frame of one image.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch

from seg3d_monai.inference.blocks import intersection, roi_slices
from seg3d_monai.inference.crowding import Found
from seg3d_monai.inference.mask_paste import PlacedMask, logits_array, placed_masks, resample_logits

AXES = ("z", "y", "x")
SAME_OBJECT_IOU = 0.3
"""Mask IoU from which detections of two views are one object: masks of neighbours share far less, those of a cell of a
few voxels no more where two views differ by a voxel."""


def merge_views(views: Sequence[Found], *, score_threshold: float, mask_threshold: float) -> Found:
    """One set of detections from several views of one image, as in weighted boxes fusion (Solovyev et al. 2021).

    By descending score, a detection joins the object of its class whose mask it shares most, if the IoU with the
    object's first detection reaches `SAME_OBJECT_IOU` and no detection of its own view is there; else it begins an
    object. Box and mask logits of an object are the means over its detections, weighted by score. Its score is the mean
    over all views, and a view that missed it counts as 0. Views that agree give what each of them gives.

    Args:
        views: each {"boxes" [M, 6], "scores" [M], "classes" [M], "mask_logits": M grids}, in one frame.
        score_threshold: objects that cannot reach this score are left out.
        mask_threshold: probability at which a voxel belongs to a mask.

    Returns:
        The same keys. One view is returned as it is.
    """
    if len(views) == 1:
        return views[0]
    every: Found = {
        "boxes": torch.cat([found["boxes"].double() for found in views]),
        "scores": torch.cat([found["scores"].double() for found in views]),
        "classes": torch.cat([found["classes"] for found in views]),
        "mask_logits": [grid for found in views for grid in found["mask_logits"]],
    }
    view_of = [view for view, found in enumerate(views) for _ in found["mask_logits"]]
    objects = _objects(every, view_of, score_threshold, mask_threshold)
    boxes, grids = [], []
    for members in objects:
        weight = every["scores"][members].clamp(min=torch.finfo(torch.float64).tiny)
        weight = weight / weight.sum()
        boxes.append(weight @ every["boxes"][members])
        corners, shape = boxes[-1].tolist(), every["mask_logits"][members[0]].shape
        grid = np.zeros(shape)
        for i, w in zip(members, weight.tolist(), strict=True):
            logits = logits_array(every["mask_logits"][i])
            grid += w * resample_logits(logits, every["boxes"][i].tolist(), corners, shape)
        grids.append(torch.from_numpy(grid))
    return {
        "boxes": torch.stack(boxes) if boxes else every["boxes"][:0],
        "scores": torch.tensor([float(every["scores"][members].sum()) / len(views) for members in objects]),
        "classes": every["classes"][[members[0] for members in objects]],
        "mask_logits": grids,
    }


def _objects(found: Found, view_of: Sequence[int], score_threshold: float, mask_threshold: float) -> list[list[int]]:
    """Rows of the detections of each object, by descending score, at most one of each view."""
    corners, classes, scores = found["boxes"].numpy(), found["classes"].numpy(), found["scores"].tolist()
    objects: list[list[int]] = []
    masks: list[PlacedMask] = []
    first = np.zeros(len(scores), dtype=np.int64)  # each object's first row and views; entries to come hold zeros
    is_seen = np.zeros((len(scores), max(view_of, default=0) + 1), dtype=bool)
    for i in found["scores"].argsort(descending=True, stable=True).tolist():
        count, known = len(objects), first[: len(objects)]
        is_near = (corners[known, :3] < corners[i, 3:]).all(1) & (corners[i, :3] < corners[known, 3:]).all(1)
        near = np.flatnonzero(is_near & (classes[known] == classes[i]) & ~is_seen[:count, view_of[i]]).tolist()
        is_too_low = scores[i] < score_threshold  # to begin an object, whose mean is at most its first score
        if is_too_low and not near:
            continue
        (mask,) = placed_masks([found["mask_logits"][i]], found["boxes"][i : i + 1], mask_threshold)
        iou = {k: _mask_iou(mask, masks[k]) for k in near}
        best = max(iou, key=iou.__getitem__, default=count)
        if iou.get(best, 0) >= SAME_OBJECT_IOU:
            objects[best].append(i)
            is_seen[best, view_of[i]] = True
        elif not is_too_low:
            objects.append([i])
            masks.append(mask)
            first[count] = i
            is_seen[count, view_of[i]] = True
    return objects


def flip_combinations(flips: Sequence[str]) -> list[tuple[int, ...]]:
    """The axes to mirror in each view, as numbers in z, y, x; the first view is the image as it is."""
    axes = [AXES.index(axis) for axis in flips]
    return [some for count in range(len(axes) + 1) for some in combinations(axes, count)]


def mirrored(found: Found, axes: Sequence[int], size: Sequence[int]) -> Found:
    """Detections of an image of `size` (D, H, W) that was mirrored along `axes`, in the image's own frame."""
    if not axes:
        return found
    boxes = found["boxes"].to(torch.float64, copy=True)  # float32 would round size - z
    for axis in axes:
        boxes[:, [axis, axis + 3]] = size[axis] - boxes[:, [axis + 3, axis]]
    return found | {"boxes": boxes, "mask_logits": [grid.flip(list(axes)) for grid in found["mask_logits"]]}


def _mask_iou(first: PlacedMask, second: PlacedMask) -> float:
    (roi, mask), (other_roi, other_mask) = first, second
    window = intersection(roi, other_roi)
    if window is None:
        return 0.0
    shared = int(np.count_nonzero(mask[roi_slices(window, roi[:3])] & other_mask[roi_slices(window, other_roi[:3])]))
    union = int(np.count_nonzero(mask)) + int(np.count_nonzero(other_mask)) - shared
    return shared / max(union, 1)
