"""Assignment of boxes to true boxes by IoU: the Python function."""

import torch
from torch import Tensor

from seg3d_monai.ops.arguments import check_boxes, check_device, fraction

BACKGROUND = -1
IGNORED = -2


def match_boxes3d(
    boxes: Tensor, truth: Tensor, foreground_iou: float, background_iou: float, match_best: bool
) -> Tensor:
    """Assign each box to its best true box, to the background, or to nothing (Ren et al. 2015, section 3.1.2).

    Made for many boxes: no matrix of all pairs is held. Boxes that are empty or not finite overlap nothing. Not
    differentiable.

    Args:
        boxes: [M, 6], float32, (z1, y1, x1, z2, y2, x2), half-open.
        truth: [G, 6], float32.
        foreground_iou: least IoU of a match, in [0, 1].
        background_iou: in [0, foreground_iou]; a box whose IoU with every true box is below is background.
        match_best: also match, whatever its IoU above zero, every box that is a true box's best one.

    Returns:
        int64 [M]: index of the true box, the first among equally good ones; BACKGROUND (-1), also where there is no
        true box; or IGNORED (-2), in between.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not fit, devices differ, or thresholds are out of range or order.
    """
    check_boxes("boxes", boxes, (torch.float32,))
    check_boxes("truth", truth, (torch.float32,))
    check_device("truth", truth, "boxes", boxes)
    foreground, background = fraction("foreground_iou", foreground_iou), fraction("background_iou", background_iou)
    if background > foreground:
        raise ValueError(f"background_iou {background} is above foreground_iou {foreground}; exchange them")
    matched: Tensor = torch.ops.seg3d.match_boxes3d(boxes.detach(), truth.detach(), foreground, background, match_best)
    return matched
