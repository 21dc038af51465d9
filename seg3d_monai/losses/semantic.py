"""Losses of the semantic maps: foreground and borders of instances on the cells of a level, against the label volume.

A voxel lies on a border if one of its six neighbours has another label, so an instance's skin does, the background next
to it, and where two instances touch both sides. What a cell should hold is the share of its voxels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def semantic_targets(label: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Foreground and borders of one image.

    Args:
        label: int64 [D, H, W]: 0 background, -1 ignored.
        size: (d, h, w) cells of the level, of ceil(D / d) voxels each along z, and so on; the last ones may be cut.

    Returns:
        Shares [2, d, h, w] of a cell's voxels that are foreground and border, of those that are not ignored; and the
        shares [d, h, w] of its voxels that are not ignored.
    """
    is_known = label >= 0
    is_border = torch.zeros_like(is_known)
    for axis, length in enumerate(label.shape):
        before, after = slice_along(axis, 0, length - 1), slice_along(axis, 1, length)
        differs = (label[before] != label[after]) & is_known[before] & is_known[after]
        is_border[before] |= differs
        is_border[after] |= differs
    maps = torch.stack([label > 0, is_border, is_known]).float()
    cell = [-(-whole // part) for whole, part in zip(label.shape, size, strict=True)]
    foreground, border, known = F.avg_pool3d(maps[None], cell, ceil_mode=True)[0]
    return torch.stack([foreground, border]) / known.clamp(min=1e-6), known


def semantic_losses(logits: Tensor, labels: Sequence[Tensor]) -> dict[str, Tensor]:
    """Binary cross-entropy and soft Dice loss, means over both maps, sums over images.

    Args:
        logits: [N, 2, d, h, w].
        labels: of each image, int64 [D, H, W].
    """
    cross_entropies, dices = [], []
    for image, label in zip(logits, labels, strict=True):
        wanted, weight = semantic_targets(label, image.shape[1:])
        each = F.binary_cross_entropy_with_logits(image, wanted, weight, reduction="none").sum((1, 2, 3))
        cross_entropies.append(each.mean() / weight.sum().clamp(min=1))
        prob = image.sigmoid() * weight
        overlap, total = (prob * wanted).sum((1, 2, 3)), (prob + wanted * weight).sum((1, 2, 3))
        dices.append((1 - (2 * overlap + 1) / (total + 1)).mean())
    return {"semantic_bce": torch.stack(cross_entropies).sum(), "semantic_dice": torch.stack(dices).sum()}


def slice_along(axis: int, start: int, stop: int) -> tuple[slice, ...]:
    """The index of a part of a tensor along one axis."""
    return (slice(None),) * axis + (slice(start, stop),)
