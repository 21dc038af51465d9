"""Exponential average of a network's weights, which is evaluated and shipped in their place."""

from copy import deepcopy

import torch
from torch import Tensor, nn


class WeightAverage:
    """Average whose decay grows from 0.1 to its value, so that a short training forgets its start.

    As torch's AveragedModel, but tensors are looked up once: to walk through the modules at every step takes a small
    network longer than the average itself.

    Args:
        network: the network that is trained; its parameters stay the same tensors.
        decay: decay a step, in (0, 1).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.module = deepcopy(network)
        self.decay = decay
        self.steps = 0
        self._averages: list[Tensor] = list(self.module.parameters())
        self._currents: list[Tensor] = list(network.parameters())
        self._buffers = list(zip(self.module.buffers(), network.buffers(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the network's parameters as they are now; buffers are copied."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.steps else 0.0
        torch._foreach_lerp_(self._averages, self._currents, weight=1 - decay)
        for average, current in self._buffers:
            average.copy_(current)
        self.steps += 1
