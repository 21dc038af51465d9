"""Assign boxes to true boxes by IoU (Ren et al. 2015, section 3.1.2), and excuse boxes on ignored voxels."""

import torch
from torch import Tensor

from seg3d_monai.ops import match_boxes3d
from seg3d_monai.ops.match_boxes3d import BACKGROUND, IGNORED


class IoUMatcher:
    """Boxes at or above `foreground_iou` match their best true box; below `background_iou` they are background.

    Args:
        foreground_iou: least IoU of a match.
        background_iou: IoU below which a box is background; in between it is ignored.
        match_best: also match, whatever its IoU above zero, every box that is a true box's best one.

    Raises:
        ValueError: thresholds out of order.
    """

    def __init__(self, *, foreground_iou: float, background_iou: float, match_best: bool) -> None:
        if not 0 <= background_iou <= foreground_iou <= 1:
            raise ValueError(
                f"background_iou {background_iou} and foreground_iou {foreground_iou} are out of order; "
                "need 0 <= background_iou <= foreground_iou <= 1"
            )
        self.foreground_iou = foreground_iou
        self.background_iou = background_iou
        self.match_best = match_best

    @torch.no_grad()
    def __call__(self, boxes: Tensor, truth: Tensor, label: Tensor | None = None) -> Tensor:
        """Match boxes to truth.

        Args:
            boxes: [M, 6].
            truth: [G, 6].
            label: label volume [D, H, W]; background boxes centred on an ignored voxel (-1) are ignored.

        Returns:
            int64 [M]: index of the true box, BACKGROUND (-1) or IGNORED (-2).
        """
        matched = match_boxes3d(boxes.float(), truth.float(), self.foreground_iou, self.background_iou, self.match_best)
        if label is not None:
            size = torch.tensor(label.shape, device=boxes.device)
            centre = ((boxes[:, :3] + boxes[:, 3:]) / 2).long().clamp(min=0).minimum(size - 1)
            on_ignored = label[centre[:, 0], centre[:, 1], centre[:, 2]] == -1
            matched[on_ignored & (matched == BACKGROUND)] = IGNORED
        return matched
