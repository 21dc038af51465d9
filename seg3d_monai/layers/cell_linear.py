"""Linear layer from a map with the channels first to cells with the channels last."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class CellLinear(nn.Linear):
    """nn.Linear over the channels of a map, of which neither the map nor its gradient is transposed in memory.

    The gradient of a map comes in the map's own order. There it meets those of convolutions, and sums and activations
    of tensors in two orders take several times as long on a CPU.

    Args:
        in_features, out_features, bias, device, dtype: as of nn.Linear.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, D, H, W] -> [N, D * H * W, out_features]."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        if not x.is_contiguous():
            return F.linear(x.flatten(2).transpose(1, 2), weight, bias)
        cells: Tensor = _Product.apply(x.flatten(2), weight)
        return cells if bias is None else cells + bias


class _Product(torch.autograd.Function):
    """Channels first x [N, I, S], weight [O, I] -> [N, S, O]; BLAS reads either matrix in either order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.bmm(x.transpose(1, 2), weight.t().expand(len(x), -1, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        of_x = torch.bmm(weight.t().expand(len(x), -1, -1), grad.transpose(1, 2))
        return of_x, torch.bmm(x, grad).sum(0).t()
