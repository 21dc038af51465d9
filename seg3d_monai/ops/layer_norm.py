"""LayerNorm (Ba et al., 2016) over the last axis, with a ReLU behind it if wanted: the Python function."""

import math
from numbers import Real

import torch
from torch import Tensor

from seg3d_monai.ops.arguments import FLOATING, check_device, check_tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, relu: bool = False) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias in each row of channels, and its positive part with `relu`.

    Moments and sums are float64 for a float64 x, else float32, also under autocast; the variance is the mean square
    distance from the mean (biased). Differentiable once in x, weight and bias; what is kept for that is x alone. Made
    for bfloat16 on CPUs; float32 takes about as long there as torch's own, float16 longer.

    Args:
        x: [..., C], C >= 1. float64, float32, bfloat16 or float16.
        weight: [C], in the dtype of `x`, or float32 if `x` is bfloat16 or float16.
        bias: [C], in the dtype of `weight`.
        eps: what is added to the variance, >= 0.
        relu: whether results below 0 become 0; a NaN stays one. The gradient passes where the result is above 0.

    Returns:
        [..., C] in the dtype of `x`, contiguous.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not fit each other, tensors are on different devices, or eps is out of range.
    """
    check_tensor("x", x, "..., C", FLOATING)
    if x.shape[-1] == 0:
        raise ValueError(f"x must have the shape [..., C] with C >= 1, got {tuple(x.shape)}")
    halves = (torch.bfloat16, torch.float16)
    check_tensor("weight", weight, "C", (x.dtype, torch.float32) if x.dtype in halves else (x.dtype,))
    check_tensor("bias", bias, "C", (weight.dtype,))
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector.shape[0] != x.shape[-1]:
            raise ValueError(f"{name} must have one entry per channel, got {vector.shape[0]} for C = {x.shape[-1]}")
        check_device(name, vector, "x", x)
    if not isinstance(eps, Real) or isinstance(eps, bool):
        raise TypeError(f"eps must be a float >= 0, got {eps!r}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a float >= 0, got {eps!r}")
    if not isinstance(relu, bool):
        raise TypeError(f"relu must be True or False, got {relu!r}")
    result: Tensor = torch.ops.seg3d.layer_norm(x, weight, bias, float(eps), relu)
    return result
