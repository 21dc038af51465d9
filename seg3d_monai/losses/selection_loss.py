"""Loss of the scores by which a decoder chooses tokens of its memory as queries: a heat map of the objects' middles.

Each instance has one token, the nearest to its middle on the level that fits its size; around it scores may be the
higher, the nearer (CenterNet, Zhou et al. 2019, eq. 1, over several levels). Must not know how tokens are chosen.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seg3d_monai.matching.points import IGNORED_VALUE

SPREAD = 1 / 6
"""Standard deviation of an instance's heat, in extents of its box."""
MISS_POWER, NEAR_POWER = 2, 4


def selection_loss(tokens: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Focal loss of the scores of all tokens, less for those near the middle of an object of their class.

    Args:
        tokens: {"class_logits" [N, S, K]; "sizes" (d, h, w) of each level, S tokens in all; "centres" [S, 3], the grid
            of each level, and "extents" [S, 3] that an object of the token's level has, both voxels; "padding" bool
            [N, S], tokens that have no loss, or None}.
        targets: for each image {"label" [D, H, W], "boxes" [G, 6], "classes" [G]}; tokens on ignored voxels have no
            loss.

    Returns:
        The sum over tokens and classes, divided by the number of instances or by 1.
    """
    logits, padding = tokens["class_logits"], tokens["padding"]
    total = logits.new_zeros(())
    for n, target in enumerate(targets):
        heat, counted = token_heat(tokens, target, logits.shape[2], None if padding is None else padding[n])
        prob = logits[n].sigmoid()
        near = (1 - heat) ** NEAR_POWER * prob**MISS_POWER * F.softplus(logits[n])
        miss = (1 - prob) ** MISS_POWER * F.softplus(-logits[n])
        total = total + (torch.where(heat == 1, miss, near) * counted[:, None]).sum()
    return total / max(1, sum(len(target["classes"]) for target in targets))


@torch.no_grad()
def token_heat(
    tokens: Mapping[str, Any], target: Mapping[str, Tensor], num_classes: int, padding: Tensor | None
) -> tuple[Tensor, Tensor]:
    """How near each token is to the middle of an object.

    Args:
        tokens: see `selection_loss`.
        target: of one image.
        num_classes: K.
        padding: bool [S] of that image, or None.

    Returns:
        Heat float32 [S, K], 1 for an instance's own token only, and bool [S], whether a token has a loss.
    """
    centres, label, classes = tokens["centres"], target["label"], target["classes"]
    last = torch.tensor(label.shape, device=label.device) - 1
    z, y, x = centres.floor().long().minimum(last).unbind(1)  # the last cell may have its centre outside
    counted = label[z, y, x] != IGNORED_VALUE
    if padding is not None:
        counted &= ~padding
    heat = centres.new_zeros(num_classes, len(centres))
    if not len(classes):
        return heat.t(), counted
    lower, upper = target["boxes"].to(centres.dtype).split(3, 1)
    middle, extent = (lower + upper) / 2, upper - lower
    counts = [d * h * w for d, h, w in tokens["sizes"]]
    grids = [
        (level.unflatten(0, size), extents[0], valid)
        for level, size, extents, valid in zip(
            centres.split(counts), tokens["sizes"], tokens["extents"].split(counts), counted.split(counts), strict=True
        )
    ]
    misfits = [
        (extent / typical).log().abs().sum(1).masked_fill(~valid.any(), torch.inf) for _, typical, valid in grids
    ]
    level_of = torch.stack(misfits).argmin(0)
    warmth, distance = [], []
    for number, (grid, typical, valid) in enumerate(grids):
        fits = (level_of == number)[:, None]
        away = [axis - middle[:, i, None] for i, axis in enumerate(_axes(grid))]
        # What depends on a distance is a product or a sum over the axes of the grid.
        heats = [(-0.5 * (d / (SPREAD * extent[:, i, None])) ** 2).exp() for i, d in enumerate(away)]
        squares = [(d / typical[i]) ** 2 for i, d in enumerate(away)]
        warmth.append(_outer(torch.mul, heats) * (fits & valid))
        distance.append(_outer(torch.add, squares).masked_fill(~(fits & valid), torch.inf))
    own = torch.cat(distance, 1).argmin(1)
    # A token that is not its instance's own stays below 1, however near.
    near = torch.cat(warmth, 1).clamp(max=0.99)
    heat = heat.scatter_reduce(0, classes[:, None].expand_as(near), near, "amax")
    heat[classes, own] = 1
    return heat.t(), counted


def _axes(grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Places along z, y and x of a grid of points [d, h, w, 3]."""
    return grid[:, 0, 0, 0], grid[0, :, 0, 1], grid[0, 0, :, 2]


def _outer(combine: Callable[[Tensor, Tensor], Tensor], axes: Sequence[Tensor]) -> Tensor:
    """Values [G, d], [G, h], [G, w], combined for each cell: [G, d * h * w]."""
    z, y, x = axes
    return combine(z[:, :, None, None], combine(y[:, :, None], x[:, None])[:, None]).flatten(1)
