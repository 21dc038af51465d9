"""Multi-layer perceptron of the prediction heads (Carion et al., DETR, 2020)."""

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with a ReLU between two of them, over the last axis.

    Args:
        in_channels: input channels.
        hidden: channels between the layers.
        out_channels: output channels.
        num_layers: linear layers, >= 1; the last is `layers[-1]`.

    Raises:
        ValueError: no layer.
    """

    def __init__(self, *, in_channels: int, hidden: int, out_channels: int, num_layers: int) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}; give at least one layer")
        inner = [hidden] * (num_layers - 1)
        self.layers = nn.ModuleList(
            nn.Linear(i, o) for i, o in zip([in_channels, *inner], [*inner, out_channels], strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_channels] -> [..., out_channels]."""
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        out: Tensor = self.layers[-1](x)
        return out
