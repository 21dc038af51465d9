"""Assign boxes to true boxes by IoU (Ren et al. 2015, section 3.1.2).

The IoU matrix is never whole: boxes are taken in chunks, and only each box's best true box and each true box's best IoU
are kept, so a million anchors against hundreds of cells take megabytes.
"""

import torch
from torch import Tensor

from seg3d_monai.ops.boxes import pairwise_iou

BACKGROUND = -1
IGNORED = -2


class IoUMatcher:
    """Boxes at or above `foreground_iou` match their best true box; below `background_iou` they are background.

    Args:
        foreground_iou: least IoU of a match.
        background_iou: IoU below which a box is background; in between it is ignored.
        match_best: also match, whatever its IoU above zero, every box that is a true box's best one.
        chunk_size: box-truth pairs of a chunk.

    Raises:
        ValueError: thresholds out of order.
    """

    def __init__(
        self,
        *,
        foreground_iou: float,
        background_iou: float,
        match_best: bool,
        chunk_size: int = 2**18,
    ) -> None:
        if not 0 <= background_iou <= foreground_iou <= 1:
            raise ValueError(
                f"background_iou {background_iou} and foreground_iou {foreground_iou} are out of order; "
                "need 0 <= background_iou <= foreground_iou <= 1"
            )
        self.foreground_iou = foreground_iou
        self.background_iou = background_iou
        self.match_best = match_best
        self.chunk_size = chunk_size

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
        matched = torch.full((len(boxes),), BACKGROUND, dtype=torch.int64, device=boxes.device)
        if len(truth) and len(boxes):
            matched = self._match(boxes.float(), truth.float())
        if label is not None:
            size = torch.tensor(label.shape, device=boxes.device)
            centre = ((boxes[:, :3] + boxes[:, 3:]) / 2).long().clamp(min=0).minimum(size - 1)
            on_ignored = label[centre[:, 0], centre[:, 1], centre[:, 2]] == -1
            matched[on_ignored & (matched == BACKGROUND)] = IGNORED
        return matched

    def _match(self, boxes: Tensor, truth: Tensor) -> Tensor:
        boxes = boxes.t().contiguous().t()  # column by column: every pass below runs along the boxes
        num_rows = max(1, self.chunk_size // len(truth))
        best_iou, best, reached = [], [], []
        truth_best = truth.new_full((len(truth),), torch.finfo(truth.dtype).tiny)  # an IoU of 0 is never the best
        for chunk in boxes.split(num_rows):
            near = _within_reach(chunk, truth)
            iou = pairwise_iou(truth[near], chunk)
            value, index = iou.max(0)
            best_iou.append(value)
            best.append(near[index])
            near_best = torch.maximum(truth_best[near], iou.amax(1))
            truth_best[near] = near_best
            if self.match_best:
                reached.append(iou.ge_(near_best[:, None]).amax(0))  # 0 or 1; a bool matrix takes ten times as long
        iou, matched = torch.cat(best_iou), torch.cat(best)
        matched[iou < self.foreground_iou] = IGNORED
        matched[iou < self.background_iou] = BACKGROUND
        if self.match_best:
            # A true box's best ones are among those that reached its best so far.
            candidates = torch.cat(reached).nonzero().squeeze(1)
            for rows in candidates.split(num_rows) if len(candidates) else ():
                near = _within_reach(boxes[rows], truth)
                is_best = pairwise_iou(truth[near], boxes[rows]) == truth_best[near, None]
                matched[rows] = torch.where(is_best.any(0), near[is_best.int().argmax(0)], matched[rows])
        return matched


def _within_reach(chunk: Tensor, truth: Tensor) -> Tensor:
    """Indices of the true boxes that touch the hull of a chunk, at least one.

    Neighbouring anchors stand in neighbouring rows, so most true boxes are out of reach of a whole chunk.
    """
    overlaps = (truth[:, :3] < chunk[:, 3:].amax(0)) & (truth[:, 3:] > chunk[:, :3].amin(0))
    near = overlaps.all(1).nonzero().squeeze(1)
    return near if len(near) else near.new_zeros(1)
