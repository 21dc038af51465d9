"""LayerNorm (Ba et al., 2016) over the last axis, with a ReLU behind it if wanted: the Python function."""

import torch
from torch import Tensor

from seg3d_monai.ops.arguments import FLOATING, check_affine, check_norm_settings, check_tensor


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
    check_affine(x, x.shape[-1], weight, bias)
    check_norm_settings(eps, relu)
    result: Tensor = torch.ops.seg3d.layer_norm(x, weight, bias, float(eps), relu)
    return result
