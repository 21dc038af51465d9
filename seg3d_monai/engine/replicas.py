"""The network of one process, or its replicas in several processes that train together, and what these agree on.

Processes meet in `torch.distributed` (torchrun, Ray Train, ...), which has to be initialised before the trainer is
built; with one process nothing here communicates. Every process calls every function in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Replicas", "from_first", "num_processes", "rank", "reduce_numbers"]


def rank() -> int:
    """Number of this process, from 0; the first one logs, validates and writes."""
    return int(idist.get_rank())


def num_processes() -> int:
    """Number of processes that train together."""
    return int(idist.get_world_size())


def reduce_numbers(numbers: Sequence[float], how: str) -> list[float]:
    """Numbers of all processes, entry by entry, as their "SUM" or "MAX"."""
    if num_processes() == 1:
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64, device=idist.device())
    reduced: Tensor = idist.all_reduce(total, op=how)
    return reduced.tolist()


def from_first(value: Any) -> Any:
    """The first process' value, in every process."""
    if num_processes() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class Replicas:
    """A network and its optimizer in step with those of the other processes: gradients are means over processes.

    Args:
        network: on its device; the same weights in every process.
        optimizer: over the network's parameters.
        scaler: of the gradients; may be disabled.

    Attributes:
        module: what is called in training; `network` itself in a single process.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        self.module = network if num_processes() == 1 else DistributedDataParallel(network)
        self._optimizer = optimizer
        self._scaler = scaler
        self._trained: list[nn.Parameter] = []

    def batch(self, *, is_first: bool, is_last: bool) -> AbstractContextManager[Any]:
        """Around the forward and backward pass of a batch, the first or last of its optimizer step."""
        if is_first:
            self._optimizer.zero_grad()
        if is_last or not isinstance(self.module, DistributedDataParallel):
            return nullcontext()
        return self.module.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        self._scaler.scale(loss).backward()

    def gradient_norm(self) -> Tensor | None:
        """Norm of all gradients together, unscaled by this; None where there are none."""
        groups = self._optimizer.param_groups
        self._trained = [p for group in groups for p in group["params"] if p.grad is not None]
        if not self._trained:
            return None
        self._scaler.unscale_(self._optimizer)
        return nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])

    def step(self, norm: Tensor, clip_norm: float | None) -> None:
        """Take an optimizer step, with gradients clipped to a norm; left out where scaled gradients overflowed."""
        if clip_norm is not None and norm > clip_norm:
            nn.utils.clip_grads_with_norm_(self._trained, clip_norm, norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
