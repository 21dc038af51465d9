"""Loss of the scores by which a decoder chooses tokens of its memory as queries: a heat map of the objects' middles.

Each instance has one token, the nearest to its middle on the level that fits its size; around it scores may be the
higher, the nearer (CenterNet, Zhou et al. 2019, eq. 1, over several levels). Must not know how tokens are chosen.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from seg3d_monai.losses.set_losses import focal_term
from seg3d_monai.matching.points import IGNORED_VALUE

SPREAD = 1 / 6
"""Standard deviation of an instance's heat, in extents of its box."""
MISS_POWER, NEAR_POWER = 2, 4


def selection_loss(tokens: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]], count: float) -> Tensor:
    """Focal loss of the scores of all tokens, less for those near the middle of an object of their class.

    Args:
        tokens: {"class_logits" [N, S, K]; "sizes" (d, h, w) of each level, S tokens in all; "centres" [S, 3], the grid
            of each level, and "extents" [S, 3] that an object of the token's level has, both voxels; "padding" bool
            [N, S], tokens that have no loss, or None}.
        targets: for each image {"label" [D, H, W], "boxes" [G, 6], "classes" [G]}; tokens on ignored voxels have no
            loss.
        count: what the sum is divided by, > 0, such as the number of instances.

    Returns:
        The sum over tokens and classes, divided by `count`.
    """
    logits = tokens["class_logits"]
    heat, counted = token_heat(tokens, targets)
    is_own = heat == 1
    weight = ((1 - heat) ** NEAR_POWER).masked_fill(is_own, 1) * counted[..., None]
    loss = weight * focal_term(logits, is_own.to(logits.dtype), gamma=MISS_POWER)
    return loss.sum() / count


@torch.no_grad()
def token_heat(tokens: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """How near each token is to the middle of an object; arguments as for `selection_loss`.

    Returns:
        Heat float32 [N, S, K], 1 for an instance's own token only, and bool [N, S], whether a token has a loss.
    """
    centres, counts = tokens["centres"], [d * h * w for d, h, w in tokens["sizes"]]
    num_images, num_tokens, num_classes = tokens["class_logits"].shape
    counted = on_annotated(targets, centres.expand(num_images, -1, -1))
    if tokens["padding"] is not None:
        counted &= ~tokens["padding"]
    # The G instances of all images in one list, each with the number of its image.
    classes = torch.cat([target["classes"] for target in targets])
    image_of = torch.cat([torch.full_like(target["classes"], n) for n, target in enumerate(targets)])
    lower, upper = torch.cat([target["boxes"] for target in targets]).to(centres.dtype).split(3, 1)
    middle, extent = (lower + upper) / 2, upper - lower

    typical = torch.stack([extents[0] for extents in tokens["extents"].split(counts)])
    has_tokens = torch.stack([level.any(1) for level in counted.split(counts, 1)], 1)
    misfit = (extent[:, None] / typical).log().abs().sum(2)
    level_of = misfit.masked_fill(~has_tokens[image_of], torch.inf).argmin(1)

    own, row, nearest, start = torch.zeros_like(classes), image_of * num_classes + classes, [], 0
    for number, (size, grid) in enumerate(zip(tokens["sizes"], centres.split(counts), strict=True)):
        fits = level_of == number
        # Two measures of the distance of every token: the spread of an instance's heat, and the level's typical extent.
        units = torch.stack([SPREAD * extent, typical[number].expand_as(extent)])
        of_spread, of_level = _squared_distance(grid.unflatten(0, size), middle, units).flatten(2)
        # An instance of another level is the nearest in a row of its own, which is dropped.
        rows = torch.where(fits, row, num_images * num_classes)
        least = centres.new_full((num_images * num_classes + 1, len(grid)), torch.inf)
        nearest.append(least.scatter_reduce_(0, rows[:, None].expand_as(of_spread), of_spread, "amin")[:-1])
        is_counted = counted[:, start : start + len(grid)][image_of]
        own = torch.where(fits, of_level.masked_fill_(~is_counted, torch.inf).argmin(1) + start, own)
        start += len(grid)
    # A token that is not its instance's own stays below 1, however near.
    heat = (-0.5 * torch.cat(nearest, 1)).exp_().clamp_(max=0.99).view(num_images, num_classes, num_tokens)
    heat[image_of, classes, own] = 1
    return heat.transpose(1, 2), counted


def on_annotated(targets: Sequence[Mapping[str, Tensor]], places: Tensor) -> Tensor:
    """Whether places lie on voxels that are not ignored.

    Args:
        targets: for each image {"label" [D, H, W]}, of one size.
        places: [N, ..., 3], voxels; past the border the nearest voxel counts.

    Returns:
        bool [N, ...].
    """
    depth, height, width = targets[0]["label"].shape
    z, y, x = places.floor().long().unbind(-1)
    index = (z.clamp(0, depth - 1) * height + y.clamp(0, height - 1)) * width + x.clamp(0, width - 1)
    return torch.stack([t["label"].take(i) for t, i in zip(targets, index.unbind(), strict=True)]) != IGNORED_VALUE


def _squared_distance(grid: Tensor, middle: Tensor, units: Tensor) -> Tensor:
    """Squared distance [U, G, d, h, w] of a grid of points [d, h, w, 3] from middles [G, 3], in units [U, G, 3].

    It is a sum over axes, and a term of it depends on one axis of the grid only.
    """
    axes = grid[:, :1, :1, 0], grid[:1, :, :1, 1], grid[:1, :1, :, 2]
    from_middle, in_units = (values[..., None, None, None, :].unbind(-1) for values in (middle, units))
    z, y, x = (((a - m) / u) ** 2 for a, m, u in zip(axes, from_middle, in_units, strict=True))
    return z + (y + x)
