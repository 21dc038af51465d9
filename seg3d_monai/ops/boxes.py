"""Box arithmetic shared by heads, matching and losses. Boxes are (z1, y1, x1, z2, y2, x2), half-open, float32."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ANCHOR_WEIGHTS = (1.0,) * 6
"""Weights of the deltas anchor -> proposal: centre shift in anchor extents, log of the extents' ratio."""
ROI_WEIGHTS = (10.0, 10.0, 10.0, 5.0, 5.0, 5.0)
"""Weights of the deltas proposal -> detection, which balance box and class loss (Girshick 2015)."""
MAX_LOG_RATIO = math.log(1000 / 16)


def encode_boxes(truth: Tensor, boxes: Tensor, weights: Sequence[float]) -> Tensor:
    """Deltas [M, 6] that move boxes [M, 6] onto truth [M, 6] (Ren et al. 2015, eq. 2), float32.

    MONAI's BoxCoder does the same sum, but raises inside the forward pass where a network diverges, and synchronises
    the device for that check once an axis.
    """
    truth, boxes = truth.float(), boxes.float()
    extent, wanted = boxes[:, 3:] - boxes[:, :3], truth[:, 3:] - truth[:, :3]
    shift = (truth[:, :3] + truth[:, 3:] - boxes[:, :3] - boxes[:, 3:]) / 2 / extent
    return torch.cat([shift, (wanted / extent).log()], 1) * shift.new_tensor(weights)


def decode_boxes(deltas: Tensor, boxes: Tensor, weights: Sequence[float]) -> Tensor:
    """Boxes [M, 6] moved by deltas [M, 6], float32; growth is limited to a factor of 62.5 a step."""
    boxes = boxes.float()
    deltas = deltas.float() / boxes.new_tensor(weights)
    extent = boxes[:, 3:] - boxes[:, :3]
    centre = (boxes[:, 3:] + boxes[:, :3]) / 2 + deltas[:, :3] * extent
    half = deltas[:, 3:].clamp(max=MAX_LOG_RATIO).exp() * extent / 2
    return torch.cat([centre - half, centre + half], 1)


def clip_boxes(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Boxes [M, 6] clipped to a volume of `size` (D, H, W)."""
    upper = torch.tensor([*size, *size], dtype=boxes.dtype, device=boxes.device)
    return torch.minimum(boxes.clamp(min=0), upper)


def non_empty(boxes: Tensor, min_size: float) -> Tensor:
    """Indices [K] of the boxes whose extent is at least `min_size` voxels on every axis."""
    return ((boxes[:, 3:] - boxes[:, :3]) >= min_size).all(1).nonzero().squeeze(1)


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU [M, G] of boxes [M, 6] and others [G, 6], one axis at a time: no [M, G, 3] temporary. Empty boxes have 0.

    Every pass runs along `others`, so it is faster with the longer list there. Not for gradients: it works in place.
    """
    rows, columns = boxes[:, :, None], others.t().contiguous()
    shared: Tensor | None = None
    for axis in range(3):
        lower = torch.maximum(rows[:, axis], columns[axis])
        extent = torch.minimum(rows[:, axis + 3], columns[axis + 3]).sub_(lower).clamp_(min=0)
        shared = extent if shared is None else shared.mul_(extent)
    assert shared is not None
    volume = (rows[:, 3:] - rows[:, :3]).clamp(min=0).prod(1)
    other_volume = (columns[3:] - columns[:3]).clamp(min=0).prod(0).clamp(min=torch.finfo(columns.dtype).tiny)
    return shared.div_((volume + other_volume).sub_(shared))


def centre_extent(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Centres and extents [..., 6] of boxes [..., 6] as shares of a volume of `size` (D, H, W), as in DETR's loss."""
    lower, upper = boxes[..., :3], boxes[..., 3:]
    return torch.cat([(lower + upper) / 2, upper - lower], -1) / boxes.new_tensor([*size, *size])


def pairwise_giou(boxes: Tensor, others: Tensor) -> Tensor:
    """Generalised IoU [M, G] in [-1, 1] of boxes [M, 6] and others [G, 6] (Rezatofighi et al. 2019), at least float32.

    One axis at a time: no [M, G, 3] temporary. An empty box has IoU 0; an empty hull takes nothing off.
    """
    rows, columns = _corners_extent(boxes[:, None]), _corners_extent(others)
    shared = hull = rows[0].new_ones(())
    axes = zip(*(values.unbind(-1) for values in (*rows, *columns)), strict=True)
    for lower, upper, extent, other_lower, other_upper, other_extent in axes:
        # Negative where they lie apart, so that the hull is both extents and the gap.
        inner = torch.minimum(upper, other_upper) - torch.maximum(lower, other_lower)
        outer = extent + other_extent - inner
        shared, hull = shared * inner.clamp(min=0), hull * outer.clamp(min=0)
    return _giou(shared, hull, _volume(rows[2]), _volume(columns[2]))


def paired_giou(boxes: Tensor, others: Tensor) -> Tensor:
    """Generalised IoU [...] in [-1, 1] of boxes [..., 6] and others [..., 6], row by row; differentiable in both."""
    lower, upper, extent = _corners_extent(boxes)
    other_lower, other_upper, other_extent = _corners_extent(others)
    inner = torch.minimum(upper, other_upper) - torch.maximum(lower, other_lower)
    outer = extent + other_extent - inner
    return _giou(_volume(inner), _volume(outer), _volume(extent), _volume(other_extent))


def _giou(shared: Tensor, hull: Tensor, volume: Tensor, other_volume: Tensor) -> Tensor:
    union = volume + other_volume - shared
    tiny = torch.finfo(union.dtype).tiny
    return shared / union.clamp(min=tiny) - (hull - union).clamp(min=0) / hull.clamp(min=tiny)


def _corners_extent(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lower corners, upper corners and extents [..., 3], at least float32, of boxes [..., 6]."""
    lower, upper = boxes.to(torch.promote_types(boxes.dtype, torch.float32)).split(3, -1)
    return lower, upper, upper - lower


def _volume(extent: Tensor) -> Tensor:
    """Product [...] of extents [..., 3], none below 0; the gradient of `prod` would wait for the device."""
    z, y, x = extent.clamp(min=0).unbind(-1)
    return z * y * x
