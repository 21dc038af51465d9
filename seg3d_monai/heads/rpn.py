"""Region proposal network (Ren et al. 2015) in 3D: features -> objectness and box deltas of every anchor."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from seg3d_monai.layers import ConvNormAct
from seg3d_monai.ops import batched_nms3d
from seg3d_monai.ops.boxes import ANCHOR_WEIGHTS, clip_boxes, decode_boxes, non_empty


class RPNHead(nn.Module):
    """One 3³ convolution, then objectness and deltas, the same weights on each level.

    Args:
        in_channels: channels of the levels.
        num_anchors: anchors at each position.
        levels: names of the levels that the head reads, finest first.
        norm: of `ConvNormAct`.
    """

    def __init__(self, *, in_channels: int, num_anchors: int, levels: Sequence[str], norm: str = "group") -> None:
        super().__init__()
        self.levels = list(levels)
        self.shared = ConvNormAct(in_channels, in_channels, norm=norm)
        self.objectness = nn.Conv3d(in_channels, num_anchors, 1)
        self.deltas = nn.Conv3d(in_channels, num_anchors * 6, 1)
        for layer in (self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, features: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """{level: [N, C, D, H, W]} -> per level objectness [N, D*H*W*A] and deltas [N, D*H*W*A, 6], float32."""
        objectness, deltas = [], []
        for level in self.levels:
            x = self.shared(features[level])
            objectness.append(self.objectness(x).float().movedim(1, -1).flatten(1))
            deltas.append(self.deltas(x).float().movedim(1, -1).reshape(x.shape[0], -1, 6))
        return objectness, deltas


@torch.no_grad()
def select_proposals(
    objectness: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    image_size: Sequence[int],
    *,
    pre_nms_top_n: int,
    post_nms_top_n: int,
    nms_threshold: float,
    min_objectness: float = 0.0,
    min_size: float = 1.0,
) -> list[Tensor]:
    """The best anchors of each level, decoded, clipped and freed of duplicates.

    Args:
        objectness: per level [N, A_l] logits.
        deltas: per level [N, A_l, 6].
        anchors: per level [A_l, 6].
        image_size: (D, H, W) of the images.
        pre_nms_top_n: anchors kept of each level and image before NMS.
        post_nms_top_n: proposals kept of each image after it.
        nms_threshold: IoU above which the proposal of lower objectness is dropped.
        min_objectness: least objectness of a proposal, a probability.
        min_size: least extent of a proposal, voxels.

    Returns:
        For each image, [P, 6] proposals by descending objectness, P <= post_nms_top_n.
    """
    best = [logits.topk(min(pre_nms_top_n, logits.shape[1]), 1) for logits in objectness]
    rows = [level_best.indices for level_best in best]
    levels = torch.cat([torch.full_like(row, level) for level, row in enumerate(rows)], 1)
    best_deltas = [d.gather(1, row[..., None].expand(-1, -1, 6)) for d, row in zip(deltas, rows, strict=True)]
    best_anchors = torch.cat([a[row] for a, row in zip(anchors, rows, strict=True)], 1)
    boxes = decode_boxes(torch.cat(best_deltas, 1).flatten(0, 1), best_anchors.flatten(0, 1), ANCHOR_WEIGHTS)
    boxes = clip_boxes(boxes, image_size)
    scores = torch.cat([b.values for b in best], 1).flatten()
    keep = non_empty(boxes, min_size)
    keep = keep[scores[keep].sigmoid() >= min_objectness]
    image = torch.arange(len(boxes), device=boxes.device) // levels.shape[1]
    groups = image * len(anchors) + levels.flatten()
    keep = keep[batched_nms3d(boxes[keep], scores[keep], groups[keep], nms_threshold)]
    return [boxes[keep[image[keep] == n][:post_nms_top_n]] for n in range(len(levels))]
