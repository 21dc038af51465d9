"""group_norm with a ReLU behind it, and its baseline, torch's own group_norm and relu_."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.problem import Problem
from seg3d_monai.ops import group_norm


def make(device: str, dtype: torch.dtype, *, shape: tuple[int, ...], groups: int) -> Problem:
    """Random volumes [N, C, D, H, W]. Close to 0 rounding decides whether the ReLU passes a gradient."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).bfloat16()
    weight, bias = torch.randn(2, shape[1], generator=generator)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm(x, weight, bias, groups, relu=True)

    def torchs_own(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.relu_(F.group_norm(x, groups, weight, bias))

    return Problem(
        ours=ours,
        baseline=torchs_own,
        baseline_name="torch's group_norm and relu_",
        input_names=("x", "weight", "bias"),
        inputs=(x.to(device, dtype), weight.to(device), bias.to(device)),
        output_shape=shape,
        differentiable=(0, 1, 2),
        read_by_backward=(0, 1),
        num_units=x.numel(),
        unit="numbers",
        kink_positions=(0,),
    )
