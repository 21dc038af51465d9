"""Maps at the coarser strides of a memory. Must not know what the maps hold."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

Axes = tuple[int, int, int]


@torch.no_grad()
def pool_to_levels(features: Tensor, strides: Sequence[Axes]) -> list[Tensor]:
    """Mask features averaged over the cells of coarser and coarser levels; masks are linear in them and pool alike.

    Args:
        features: [N, Cm, D, H, W], zero in padding.
        strides: (z, y, x) of the features, then of each level, finest first; each divides the next.

    Returns:
        [N, Cm, d, h, w] of each level, float32 or better. A cell that the border cuts is averaged with zeros for what
        it lacks, which changes no sign.
    """
    pooled, cells = [], features.movedim(1, -1)
    for fine, coarse in pairwise(strides):
        ratio = [c // f for f, c in zip(fine, coarse, strict=True)]
        missing = [-n % r for n, r in zip(cells.shape[1:4], ratio, strict=True)]
        if any(missing):  # padding by nothing would copy
            cells = F.pad(cells, (0, 0, 0, missing[2], 0, missing[1], 0, missing[0]))
        # Slices along z and y are long runs of memory, and half types stay halved until x: on a CPU this takes a
        # twentieth of the time of a mean over three axes.
        cells = _sum_of_slices(_sum_of_slices(cells, 1, ratio[0]), 2, ratio[1])
        cells = _sum_of_slices(cells.to(torch.promote_types(cells.dtype, torch.float32)), 3, ratio[2])
        cells = cells / math.prod(ratio)
        pooled.append(cells.movedim(-1, 1))
    return pooled


def _sum_of_slices(cells: Tensor, axis: int, step: int) -> Tensor:
    """Each `step` cells along an axis added up."""
    start, *rest = (cells[(slice(None),) * axis + (slice(i, None, step),)] for i in range(step))
    for one in rest:
        start = start + one
    return start
