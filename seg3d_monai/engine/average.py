"""Exponential average of a network's weights, which is evaluated and shipped in their place."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn


class TensorAverage:
    """Average of tensors whose decay grows from 0.1 to its value, so that a short training forgets its start.

    As torch's AveragedModel, but tensors are looked up once: to walk through the modules at every step takes a small
    network longer than the average itself.

    Args:
        currents: what is averaged; they stay the same tensors.
        decay: decay a step, in (0, 1).
        averages: tensors that hold the average; copies of `currents` by default.

    Attributes:
        averages: the averages, in the order of `currents`.
        steps: updates so far.
    """

    def __init__(self, currents: Sequence[Tensor], decay: float, averages: Sequence[Tensor] | None = None) -> None:
        self.decay = decay
        self.steps = 0
        self.averages = [c.detach().clone() for c in currents] if averages is None else list(averages)
        self._currents = list(currents)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the tensors as they are now."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.steps else 0.0
        torch._foreach_lerp_(self.averages, self._currents, weight=1 - decay)
        self.steps += 1


class WeightAverage(TensorAverage):
    """Average of a network's parameters; its buffers are copied.

    Args:
        network: the network that is trained; its parameters stay the same tensors.
        decay: decay a step, in (0, 1).

    Attributes:
        module: a copy of the network that holds the average.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.module = deepcopy(network)
        super().__init__(list(network.parameters()), decay, list(self.module.parameters()))
        self._buffers = list(zip(self.module.buffers(), network.buffers(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the network's parameters and buffers as they are now."""
        super().update()
        for average, current in self._buffers:
            average.copy_(current)
