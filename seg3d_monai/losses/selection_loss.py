"""Loss of the scores by which a decoder chooses tokens of its memory as queries: a heat map of the objects' middles.

Each instance has one token, the nearest to its middle on the level that fits its size; around it scores may be the
higher, the nearer (CenterNet, Zhou et al. 2019, eq. 1, over several levels). Must not know how tokens are chosen.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from seg3d_monai.matching.points import IGNORED_VALUE

SPREAD = 1 / 6
"""Standard deviation of an instance's heat, in extents of its box."""
MISS_POWER, NEAR_POWER = 2, 4


def selection_loss(tokens: Mapping[str, Tensor | None], targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Focal loss of the scores of all tokens, less for those near the middle of an object of their class.

    Args:
        tokens: {"class_logits" [N, S, K]; "centres" [S, 3], "extents" [S, 3] that an object of the token's level has,
            both voxels; "padding" bool [N, S], tokens that have no loss, or None}.
        targets: for each image {"label" [D, H, W], "boxes" [G, 6], "classes" [G]}; tokens on ignored voxels have no
            loss.

    Returns:
        The sum over tokens and classes, divided by the number of instances or by 1.
    """
    logits, padding = tokens["class_logits"], tokens["padding"]
    assert logits is not None
    total = logits.new_zeros(())
    for n, target in enumerate(targets):
        heat, counted = token_heat(tokens, target, logits.shape[2], None if padding is None else padding[n])
        prob, hit = logits[n].sigmoid(), heat == 1
        near = (1 - heat) ** NEAR_POWER * prob**MISS_POWER * F.softplus(logits[n])
        miss = (1 - prob) ** MISS_POWER * F.softplus(-logits[n])
        total = total + (torch.where(hit, miss, near) * counted[:, None]).sum()
    return total / max(1, sum(len(target["classes"]) for target in targets))


@torch.no_grad()
def token_heat(
    tokens: Mapping[str, Tensor | None], target: Mapping[str, Tensor], num_classes: int, padding: Tensor | None
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
    centres, extents = tokens["centres"], tokens["extents"]
    assert centres is not None
    assert extents is not None
    label, classes = target["label"], target["classes"]
    last = torch.tensor(label.shape, device=label.device) - 1
    z, y, x = centres.floor().long().minimum(last).unbind(1)  # the last cell may have its centre outside
    counted = label[z, y, x] != IGNORED_VALUE
    if padding is not None:
        counted &= ~padding
    heat = centres.new_zeros(len(centres), num_classes)
    if not len(classes):
        return heat, counted
    lower, upper = target["boxes"].to(centres.dtype).split(3, 1)
    middle, extent = ((lower + upper) / 2)[:, None], (upper - lower)[:, None]
    misfit = (extent / extents).log().abs().sum(2)  # [G, S], the same for all tokens of a level
    usable = counted.expand_as(misfit)
    misfit = misfit.masked_fill(~usable, torch.inf)
    fits = usable & (misfit == misfit.amin(1, keepdim=True))
    away = centres - middle
    distance = (away / extents).square().sum(2).masked_fill(~fits, torch.inf)
    own = distance.argmin(1)
    # A token that is not its instance's own stays below 1, however near.
    warmth = (-0.5 * (away / (SPREAD * extent)).square().sum(2)).exp().clamp(max=0.99) * fits
    heat = heat.scatter_reduce(1, classes.expand(len(heat), -1), warmth.t(), "amax")
    heat[own, classes] = 1
    return heat, counted
