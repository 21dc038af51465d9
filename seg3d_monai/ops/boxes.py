"""Box arithmetic shared by heads, matching and losses. Boxes are (z1, y1, x1, z2, y2, x2), half-open, float32."""

from collections.abc import Sequence

import torch
from monai.apps.detection.utils.box_coder import BoxCoder
from torch import Tensor

ANCHOR_CODER = BoxCoder(weights=(1.0,) * 6)
"""Anchor -> proposal: centre shift in anchor extents, log of the extents' ratio (Ren et al. 2015)."""
ROI_CODER = BoxCoder(weights=(10.0, 10.0, 10.0, 5.0, 5.0, 5.0))
"""Proposal -> detection, with the weights that Fast R-CNN's code uses to balance box and class loss."""


def encode_boxes(coder: BoxCoder, truth: Tensor, boxes: Tensor) -> Tensor:
    """Deltas [M, 6] that move boxes [M, 6] onto truth [M, 6], float32."""
    return coder.encode_single(truth.float(), boxes.float()) if len(boxes) else boxes.new_zeros((0, 6))


def decode_boxes(coder: BoxCoder, deltas: Tensor, boxes: Tensor) -> Tensor:
    """Boxes [M, 6] moved by deltas [M, 6], float32."""
    return coder.decode_single(deltas.float(), boxes.float())


def clip_boxes(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Boxes [M, 6] clipped to a volume of `size` (D, H, W)."""
    upper = torch.tensor([*size, *size], dtype=boxes.dtype, device=boxes.device)
    return torch.minimum(boxes.clamp(min=0), upper)


def non_empty(boxes: Tensor, min_size: float) -> Tensor:
    """Indices [K] of the boxes whose extent is at least `min_size` voxels on every axis."""
    return ((boxes[:, 3:] - boxes[:, :3]) >= min_size).all(1).nonzero().squeeze(1)


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU [M, G] of boxes [M, 6] and others [G, 6], one axis at a time: no [M, G, 3] temporary. Empty boxes have 0."""
    shared: Tensor | None = None
    for axis in range(3):
        lower = torch.maximum(boxes[:, None, axis], others[None, :, axis])
        upper = torch.minimum(boxes[:, None, axis + 3], others[None, :, axis + 3])
        extent = upper.sub_(lower).clamp_(min=0)
        shared = extent if shared is None else shared.mul_(extent)
    assert shared is not None
    volume = (boxes[:, 3:] - boxes[:, :3]).clamp(min=0).prod(1)[:, None]
    other_volume = (others[:, 3:] - others[:, :3]).clamp(min=0).prod(1)[None]
    return shared / (volume + other_volume - shared).clamp(min=torch.finfo(shared.dtype).tiny)
