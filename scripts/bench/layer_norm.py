"""layer_norm and its baseline, torch's own layer_norm, followed by a ReLU if there is one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.problem import Problem
from seg3d_monai.ops import layer_norm


def make(device: str, dtype: torch.dtype, *, rows: int, channels: int, relu: bool = False) -> Problem:
    """Random rows of channels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, channels, generator=generator).bfloat16()
    weight, bias = torch.randn(2, channels, generator=generator)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm(x, weight, bias, relu=relu)

    def torchs_own(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        normed = F.layer_norm(x, (channels,), weight, bias)
        return torch.relu(normed) if relu else normed

    return Problem(
        ours=ours,
        baseline=torchs_own,
        baseline_name="torch's layer_norm",
        input_names=("x", "weight", "bias"),
        inputs=(x.to(device, dtype), weight.to(device), bias.to(device)),
        output_shape=(rows, channels),
        differentiable=(0, 1, 2),
        read_by_backward=(0, 1),
        num_units=rows * channels,
        unit="numbers",
    )
