"""Box head of Faster R-CNN in 3D: RoI features -> class logits and box deltas; and detections from them."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from seg3d_monai.ops import nms3d
from seg3d_monai.ops.boxes import ROI_WEIGHTS, clip_boxes, decode_boxes, non_empty


class BoxHead(nn.Module):
    """Two fully connected layers, then class logits and class-agnostic deltas.

    Args:
        in_channels: channels of the RoI features.
        roi_size: (z, y, x) bins of the RoI features.
        num_classes: foreground classes; the logits have one more column, the last, for background.
        hidden: units of the two layers.
    """

    def __init__(self, *, in_channels: int, roi_size: Sequence[int], num_classes: int, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(),
            nn.Linear(in_channels * prod(roi_size), hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
        )
        self.class_logits = nn.Linear(hidden, num_classes + 1)
        self.deltas = nn.Linear(hidden, 6)
        nn.init.normal_(self.class_logits.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        nn.init.zeros_(self.class_logits.bias)
        nn.init.zeros_(self.deltas.bias)

    def forward(self, roi_features: Tensor) -> tuple[Tensor, Tensor]:
        """[K, C, d, h, w] -> class logits [K, num_classes + 1] and deltas [K, 6], float32."""
        x = self.body(roi_features)
        return self.class_logits(x).float(), self.deltas(x).float()


@torch.no_grad()
def select_detections(
    class_logits: Tensor,
    deltas: Tensor,
    proposals: Tensor,
    image_size: Sequence[int],
    *,
    score_threshold: float,
    nms_threshold: float,
    max_detections: int,
) -> dict[str, Tensor]:
    """Detections of one image.

    A proposal is a detection of its most probable class, and duplicates are dropped across classes: a region of voxels
    is one cell of one class.

    Args:
        class_logits: [P, num_classes + 1].
        deltas: [P, 6].
        proposals: [P, 6].
        image_size: (D, H, W).
        score_threshold: least probability of a detection.
        nms_threshold: IoU above which the lower-scored of two detections is dropped.
        max_detections: detections kept, best first.

    Returns:
        {"boxes": [M, 6], "scores": [M], "classes": [M], "rows": int64 [M], their proposals} by descending score.
    """
    prob = class_logits.softmax(1)[:, :-1]
    boxes = clip_boxes(decode_boxes(deltas, proposals, ROI_WEIGHTS), image_size)
    score, label = prob.max(1)
    keep = non_empty(boxes, 1.0)
    keep = keep[score[keep] >= score_threshold]
    rows = keep[nms3d(boxes[keep], score[keep], nms_threshold)[:max_detections]]
    return {"boxes": boxes[rows], "scores": score[rows], "classes": label[rows], "rows": rows}
