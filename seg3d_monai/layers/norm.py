"""Norms that look at one cell at a time, so that they answer the same in a block of any size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CellNorm(nn.LayerNorm):
    """LayerNorm that keeps half types under autocast, which would double the memory of the finest maps."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C], same dtype; moments are float32 or better."""
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class ChannelNorm(CellNorm):
    """`CellNorm` over the channels of each cell of a map."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, D, H, W] -> the same."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)
