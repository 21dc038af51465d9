"""Separable filters whose bits depend neither on the number of threads nor on what else is computed beside a voxel.

It must not know what is filtered, or why.
"""

from collections.abc import Sequence

import torch


def filter_along(image: torch.Tensor, kernel: Sequence[float], axis: int) -> torch.Tensor:
    """Correlate along an axis with a kernel of odd length; 0 lies outside.

    It is a sum of shifted images.

    Args:
        image: floating, of any shape.
        kernel: weights, the middle one for the voxel itself.
        axis: the axis.
    """
    radius, length = len(kernel) // 2, image.shape[axis]
    result = image * kernel[radius]
    for shift in range(1, min(radius, length - 1) + 1):
        inner = length - shift
        result.narrow(axis, shift, inner).add_(image.narrow(axis, 0, inner), alpha=kernel[radius - shift])
        result.narrow(axis, 0, inner).add_(image.narrow(axis, shift, inner), alpha=kernel[radius + shift])
    return result
