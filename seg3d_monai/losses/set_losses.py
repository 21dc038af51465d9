"""Formulas of set prediction: class, masks at points, boxes. Nothing is summed over queries here.

Must not know matching, layers or weights.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from seg3d_monai.ops.boxes import centre_extent, paired_giou

LINEAR_LOGIT = 40.0
"""Where log(1 + exp(x)) is x in float64 too; exp is finite in float32 there."""


def focal_loss(logits: Tensor, truth: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Focal loss (Lin et al. 2017, eq. 5) of each logit.

    Args:
        logits: [...].
        truth: [...], 1 for the positive class, 0 for the negative.
        alpha: weight of positives, 1 - alpha that of negatives; in [0, 1].
        gamma: exponent of what is missing to a sure answer, >= 0.

    Returns:
        [...], not reduced.
    """
    weight = alpha * truth + (1 - alpha) * (1 - truth)
    return weight * focal_term(logits, truth, gamma=gamma)


def focal_term(logits: Tensor, truth: Tensor, *, gamma: float) -> Tensor:
    """Focal loss [...] with no weight of positives (Lin et al. 2017, eq. 4); arguments as for `focal_loss`."""
    wrong = logits * (1 - 2 * truth)  # the logit of the answer that is not true
    return wrong.sigmoid() ** gamma * F.softplus(wrong, threshold=LINEAR_LOGIT)


def mask_bce(logits: Tensor, occupancy: Tensor, valid: Tensor) -> Tensor:
    """Binary cross-entropy of masks, a mean over the points that are valid; 0 where none is.

    Args:
        logits: [..., T], a mask at T points.
        occupancy: in [0, 1], expands to the logits.
        valid: 1 or 0, expands to the logits.

    Returns:
        [...].
    """
    loss = F.binary_cross_entropy_with_logits(logits, occupancy.expand_as(logits), valid, reduction="none")
    return loss.sum(-1) / valid.sum(-1).clamp(min=1)


def mask_dice(logits: Tensor, occupancy: Tensor, valid: Tensor) -> Tensor:
    """Soft Dice loss of masks over the valid points, 1 added above and below; arguments as for `mask_bce`."""
    prob = logits.sigmoid() * valid
    truth = occupancy * valid
    return 1 - (2 * (prob * truth).sum(-1) + 1) / (prob.sum(-1) + truth.sum(-1) + 1)


def box_l1(boxes: Tensor, truth: Tensor, image_size: Sequence[int]) -> Tensor:
    """L1 distance [...] of (centre, extent) as shares of the crop, a sum over its six numbers.

    Args:
        boxes: [..., 6], voxels.
        truth: [..., 6], voxels.
        image_size: (D, H, W) of the crop.
    """
    return centre_extent(boxes - truth, image_size).abs().sum(-1)  # both are linear in the box


def box_giou(boxes: Tensor, truth: Tensor) -> Tensor:
    """1 - generalised IoU [...], in [0, 2], of boxes [..., 6] and truth [..., 6]."""
    return 1 - paired_giou(boxes, truth)


def class_focal(logits: Tensor, classes: Tensor, counted: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Focal loss of each query, a sum over the classes.

    Args:
        logits: [..., K].
        classes: int64 [...], the true class, or -1 for "no object".
        counted: bool [...], False where a query has no loss.

    Returns:
        [...].
    """
    truth = (classes[..., None] == torch.arange(logits.shape[-1], device=logits.device)).to(logits.dtype)
    return focal_loss(logits, truth, alpha=alpha, gamma=gamma).sum(-1) * counted


def class_cross_entropy(logits: Tensor, classes: Tensor, counted: Tensor, *, no_object_weight: float) -> Tensor:
    """Weighted cross-entropy of each query (DETR).

    Args:
        logits: [..., K + 1], the last class being "no object".
        classes: int64 [...], the true class, or -1 for "no object".
        counted: bool [...], False where a query has no loss.
        no_object_weight: weight of "no object", > 0; a class weighs 1.

    Returns:
        [...].
    """
    wanted = torch.where(classes < 0, logits.shape[-1] - 1, classes)
    loss = F.cross_entropy(logits.flatten(0, -2), wanted.flatten(), reduction="none").view(classes.shape)
    return loss * torch.ones_like(loss).masked_fill(classes < 0, no_object_weight) * counted
