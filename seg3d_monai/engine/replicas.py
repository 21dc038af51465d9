"""The network of one process, or its replicas in several processes that train together, and what these agree on.

Processes meet in `torch.distributed` (torchrun, Ray Train, ...), which has to be initialised before the trainer is
built; with one process nothing here communicates. Every process calls every function in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from seg3d_monai.engine.average import WeightAverage

__all__ = ["Replicas", "from_first", "num_processes", "rank", "reduce_numbers"]


def rank() -> int:
    """Number of this process, from 0; the first one logs, validates and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_processes() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def reduce_numbers(numbers: Sequence[float], how: str) -> list[float]:
    """Numbers of all processes, entry by entry, as their "SUM" or "MAX"."""
    if num_processes() == 1:
        return list(numbers)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    reduced = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(reduced, getattr(dist.ReduceOp, how))
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
        self._network = network
        self._optimizer = optimizer
        self._scaler = scaler

    @property
    def is_scaled(self) -> bool:
        """Whether losses are scaled: then a gradient that is not finite is an overflow, no fault."""
        return self._scaler.is_enabled()

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

    def leave_out(self, loss: Tensor, *, is_last: bool) -> None:
        """Go on without the gradients of a loss; all processes leave out the same batch.

        With several processes the last batch of a step takes the whole step with it: gradients are exchanged in its
        backward pass only.
        """
        if is_last and num_processes() > 1:
            self._optimizer.zero_grad()

    def step(self, clip_norm: float | None) -> Tensor | None:
        """Take an optimizer step, with gradients clipped to a norm; left out where they are not finite.

        Returns:
            Norm of all gradients together, before clipping; None where there are none.
        """
        groups = self._optimizer.param_groups
        trained = [p for group in groups for p in group["params"] if p.grad is not None]
        if not trained:
            return None
        self._scaler.unscale_(self._optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if self.is_scaled or norm.isfinite():
            if clip_norm is not None and norm > clip_norm:
                nn.utils.clip_grads_with_norm_(trained, clip_norm, norm)
            self._scaler.step(self._optimizer)
            self._scaler.update()
        return norm

    def average(self, decay: float) -> WeightAverage:
        """An average of the weights, as they are now."""
        return WeightAverage(self._network, decay)

    @contextmanager
    def evaluated(self, average: WeightAverage | None) -> Iterator[None]:
        """Give the network the averaged weights, if any, within a `with`."""
        try:
            self._swap(average)
            yield
        finally:
            self._swap(average)

    def state(self, average: WeightAverage | None) -> dict[str, Any]:
        """Weights, their average, and the optimizer's state, by the names that `load` reads."""
        return {
            "network": self._network.state_dict(),
            "ema": None if average is None else average.module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "grad_scaler": self._scaler.state_dict(),
        }

    def load(self, state: dict[str, Any], average: WeightAverage | None) -> None:
        """Take over what `state` gave, here or in processes of another number or under DeepSpeed.

        Raises:
            RuntimeError, ValueError: if it is of another network or optimizer.
        """
        self._network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.module.load_state_dict(state["ema"])
        if state["grad_scaler"]:
            self._scaler.load_state_dict(state["grad_scaler"])

    @torch.no_grad()
    def _swap(self, average: WeightAverage | None) -> None:
        if average is not None:
            for mine, averaged in zip(self._network.parameters(), average.module.parameters(), strict=True):
                kept = mine.clone()
                mine.copy_(averaged)
                averaged.copy_(kept)
