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
    is_border = torch.zeros_like(label, dtype=torch.bool)
    for axis, length in enumerate(label.shape):
        before, after = label.narrow(axis, 0, length - 1), label.narrow(axis, 1, length - 1)
        differs = (before != after) & (before >= 0) & (after >= 0)
        is_border.narrow(axis, 0, length - 1).logical_or_(differs)
        is_border.narrow(axis, 1, length - 1).logical_or_(differs)
    maps = torch.stack([label > 0, is_border, label >= 0]).float()
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
