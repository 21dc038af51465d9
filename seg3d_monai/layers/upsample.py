"""Nearest upsampling by whole ratios."""

from collections.abc import Sequence

import torch
from torch import Tensor


def repeat_cells(x: Tensor, ratio: Sequence[int], first_axis: int) -> Tensor:
    """Nearest upsampling: cell i of the result is cell i // ratio of `x`.

    Unlike F.interpolate it takes maps with their channels first or last, and its gradient is a sum of whole tensors.

    Args:
        x: any shape with three axes of space in a row.
        ratio: (z, y, x) cells of the result along one of `x`.
        first_axis: the axis z of `x`.

    Returns:
        The same axes, those of space `ratio` times as long.
    """
    # From the innermost axis on: each turn writes the longest runs that it can.
    for axis in reversed(range(3)):
        if ratio[axis] > 1:
            at = first_axis + axis
            x = torch.stack([x] * ratio[axis], at + 1).flatten(at, at + 1)
    return x
