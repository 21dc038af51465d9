"""Greedy non-maximum suppression of 3D boxes, alone and within groups: the Python functions."""

import torch
from torch import Tensor

from seg3d_monai.ops.arguments import (
    FLOATING,
    check_boxes,
    check_device,
    check_length,
    check_tensor,
    check_values_finite,
    fraction,
    values_are_readable,
)


def nms3d(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Keep the best box, drop those whose IoU with it is over the threshold, and go on with the rest.

    IoU is computed in float64. An empty box (no extent on an axis) has IoU 0 with everything, so it is always kept
    and drops nothing.

    Args:
        boxes: [N, 6], floating, (z1, y1, x1, z2, y2, x2), half-open.
        scores: [N], floating.
        iou_threshold: in [0, 1]; a box is dropped when its IoU with a kept one is greater than this.

    Returns:
        int64 [M], indices of the kept boxes by descending score, ties by lower index.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not fit, devices differ, the threshold is outside [0, 1], a box is not finite, or a
            score is NaN.
    """
    threshold = _checked_threshold(boxes, scores, iou_threshold)
    return torch.ops.seg3d.nms3d(boxes.detach(), scores.detach(), threshold)


def batched_nms3d(boxes: Tensor, scores: Tensor, group: Tensor, iou_threshold: float) -> Tensor:
    """`nms3d` within each group: boxes of different groups do not see each other.

    Groups are compared as integers; boxes are not moved apart, so no coordinate loses precision.

    Args:
        boxes: [N, 6], floating, (z1, y1, x1, z2, y2, x2), half-open.
        scores: [N], floating.
        group: [N], int64, any values, e.g. class, image or pyramid level.
        iou_threshold: in [0, 1]; a box is dropped when its IoU with a kept one of its group is greater than this.

    Returns:
        int64 [M], indices of the kept boxes of all groups together by descending score, ties by lower index.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not fit, devices differ, the threshold is outside [0, 1], a box is not finite, or a
            score is NaN.
    """
    threshold = _checked_threshold(boxes, scores, iou_threshold)
    check_tensor("group", group, "N", (torch.int64,))
    check_length("group", group, boxes)
    check_device("group", group, "boxes", boxes)
    return torch.ops.seg3d.batched_nms3d(boxes.detach(), scores.detach(), group, threshold)


def _checked_threshold(boxes: Tensor, scores: Tensor, iou_threshold: float) -> float:
    """Check what both functions share; the threshold as a float."""
    check_boxes("boxes", boxes, FLOATING)
    check_tensor("scores", scores, "N", FLOATING)
    check_length("scores", scores, boxes)
    check_device("scores", scores, "boxes", boxes)
    check_values_finite("boxes", boxes)
    if values_are_readable(scores) and bool(torch.isnan(scores).any()):
        row = int(torch.isnan(scores).nonzero()[0])
        raise ValueError(f"scores[{row}] is NaN; remove that box, or find out where the NaN comes from")
    return fraction("iou_threshold", iou_threshold)
