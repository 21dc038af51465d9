"""GroupNorm (Wu & He, 2018) over the channels of a volume, with a ReLU behind it if wanted: the Python function."""

from numbers import Integral

import torch
from torch import Tensor

from seg3d_monai.ops.arguments import FLOATING, check_affine, check_norm_settings, check_tensor


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, relu: bool = False) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias with the moments of each group; its positive part with `relu`.

    A group is C / `groups` neighbouring channels of one image. Moments and sums are float64 for a float64 x, else
    float32 or better, also under autocast; the variance is the mean square distance from the mean (biased).
    Differentiable once in x, weight and bias; what is kept for that is x and two numbers a group. Made for CPUs.

    Args:
        x: [N, C, ...], C >= 1. float64, float32, bfloat16 or float16.
        weight: [C], in the dtype of `x`, or float32 if `x` is bfloat16 or float16.
        bias: [C], in the dtype of `weight`.
        groups: how many, >= 1; they divide C.
        eps: what is added to the variance, >= 0.
        relu: whether results below 0 become 0; a NaN stays one. The gradient passes where the result is above 0.

    Returns:
        [N, C, ...] in the dtype of `x`, contiguous.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not fit each other, tensors are on different devices, or a number is out of range.
    """
    check_tensor("x", x, "N, C, ...", FLOATING)
    channels = x.shape[1]
    if channels == 0:
        raise ValueError(f"x must have the shape [N, C, ...] with C >= 1, got {tuple(x.shape)}")
    check_affine(x, channels, weight, bias)
    if not isinstance(groups, Integral) or isinstance(groups, bool):
        raise TypeError(f"groups must be an int >= 1, got {groups!r}")
    if groups < 1 or channels % groups != 0:
        raise ValueError(f"groups must be >= 1 and divide C = {channels}, got {groups}")
    check_norm_settings(eps, relu)
    result: Tensor = torch.ops.seg3d.group_norm(x, weight, bias, int(groups), float(eps), relu)[0]
    return result
