"""Norms with a ReLU behind them where that is wanted: LayerNorms, GroupNorm, BatchNorm.

A LayerNorm looks at the channels of one cell at a time, so it answers the same in a block of any size; GroupNorm looks
at all cells of some channels, BatchNorm at all cells of the batch in training and at none afterwards.

On CPUs large maps run on the operators of `seg3d_monai.ops` where that takes less time, all else on torch's own. Both
answer the same up to rounding; the operators' gradients of the parameters stay exact. Parameters are named as in
nn.LayerNorm and nn.GroupNorm.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seg3d_monai.ops import group_norm, layer_norm

HALVES = (torch.bfloat16, torch.float16)
LEAST_NUMBERS = 50_000
"""A smaller x takes torch's own norm on CPUs too, because a call of the operator itself takes longer."""
LEAST_GROUPED_NUMBERS = 300_000
"""The same for GroupNorm."""


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last axis, followed by a ReLU if wanted.

    Args:
        channels: length C of the last axis.
        eps: what is added to the variance.
        relu: whether results below 0 become 0.
    """

    def __init__(self, channels: int, eps: float = 1e-5, relu: bool = False) -> None:
        super().__init__(channels, eps)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> the same shape, in the dtype of nn.LayerNorm: that of x, or float32 under autocast on CUDA."""
        return self._normed(x, self.weight, self.bias)

    def _normed(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if _gains_from_operator(x):
            return layer_norm(x, weight, bias, self.eps, self.relu)
        normed = F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        return torch.relu(normed) if self.relu else normed

    def extra_repr(self) -> str:
        """The settings, for print(module)."""
        return f"{super().extra_repr()}, relu={self.relu}"


class CellNorm(LayerNorm):
    """LayerNorm that keeps half types under autocast, which would double the memory of the finest maps.

    Args:
        channels: of the last axis.
        eps: added to the variance.
        relu: whether a ReLU follows.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C], same dtype; moments are float32 or better."""
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        # On CPUs half types take float32 parameters as they are, by the operator and by torch.
        if not (x.device.type == "cpu" and x.dtype in HALVES and weight.dtype == torch.float32):
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return self._normed(x, weight, bias)


class ChannelNorm(CellNorm):
    """`CellNorm` over the channels of each cell of a map.

    Args:
        channels: of the map, its second axis.
        eps, relu: as of `CellNorm`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, D, H, W] -> the same."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm, followed by a ReLU if wanted.

    Args:
        groups: how many groups; they divide `channels`.
        channels: number C of channels.
        eps: what is added to the variance.
        relu: whether results below 0 become 0.
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-5, relu: bool = False) -> None:
        super().__init__(groups, channels, eps)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] -> the same shape, in the dtype of nn.GroupNorm: that of x, or float32 under autocast on CUDA."""
        if self._gains(x):
            return group_norm(x, self.weight, self.bias, self.num_groups, self.eps, self.relu)
        normed = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return torch.relu_(normed) if self.relu else normed

    def extra_repr(self) -> str:
        """The settings, for print(module)."""
        return f"{super().extra_repr()}, relu={self.relu}"

    def _gains(self, x: Tensor) -> bool:
        """Whether the operator takes less time than torch's own norm and ReLU; in float32 it gains from the latter."""
        fits = x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and self.relu)
        if x.device.type != "cpu" or not fits or self.weight.dtype not in (x.dtype, torch.float32):
            return False
        # A graph that is traced serves other sizes too.
        return torch.compiler.is_compiling() or (x.numel() >= LEAST_GROUPED_NUMBERS and x.is_contiguous())


class BatchNorm(nn.BatchNorm3d):
    """nn.BatchNorm3d, followed by a ReLU if wanted.

    A batch is a few large crops, whose moments scatter: the running ones, with which it predicts, are of some fifty
    steps rather than of ten. Too few numbers for moments, such as those of no RoI, are normed as in a prediction.

    Args:
        channels: number C of channels.
        relu: whether results below 0 become 0.
    """

    def __init__(self, channels: int, relu: bool = False) -> None:
        super().__init__(channels, momentum=0.02)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, D, H, W] -> the same, in the dtype of nn.BatchNorm3d: that of x."""
        mean, var = self.running_mean, self.running_var
        assert mean is not None
        weight, bias = self.weight.to(mean.dtype), self.bias.to(mean.dtype)  # DeepSpeed halves these alone
        is_of_batch = self.training and x.numel() > x.shape[1]
        normed = F.batch_norm(x, mean, var, weight, bias, is_of_batch, float(self.momentum or 0), self.eps)
        return torch.relu_(normed) if self.relu else normed

    def extra_repr(self) -> str:
        """The settings, for print(module)."""
        return f"{super().extra_repr()}, relu={self.relu}"


def _gains_from_operator(x: Tensor) -> bool:
    """Whether the operator takes less time than torch's own norm: for other dtypes that is as fast, or faster."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return False
    # A graph that is traced serves other sizes too.
    return torch.compiler.is_compiling() or x.numel() >= LEAST_NUMBERS
