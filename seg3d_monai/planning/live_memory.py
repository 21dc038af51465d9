"""Bytes of tensors that are alive at once while code runs, counted tensor by tensor rather than asked of the system.

Every operator's results are seen on their way out, forwards and backwards, and a storage counts from then until it is
freed: what is saved for the backward pass, gradients, and what comes and goes in between. The count does not depend on
the machine. What an operator takes for itself while it runs is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

OPTIMIZER_COPIES = 4
"""Tensors as large as the weights that a training keeps beside their gradients: the weights themselves, two moments of
Adam, and the average that is evaluated."""


class LivePeak(TorchDispatchMode):
    """Within a `with`, follows storages that operators make.

    Attributes:
        live: bytes of those that are alive.
        peak: the most that `live` has been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator and look at its results."""
        results = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_iter(results):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage(), given)
        return results

    def _follow(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in given:  # a view, or a result in place
            return

        def forget(_: object) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)


def training_peak(network: nn.Module, criterion: Any, image: Tensor, target: Mapping[str, Tensor], amp: Any) -> int:
    """Most bytes that one image takes in a training step, its gradients included, the weights not.

    Args:
        network: in train mode, (images, targets) -> outputs; it gets gradients.
        criterion: (outputs, targets) -> {name: scalar}.
        image: [1, C, D, H, W].
        target: of this image.
        amp: type of the autocast, None for none.
    """
    with LivePeak() as counted:
        with torch.autocast("cpu", amp, enabled=amp is not None):
            outputs = network(image, [target])
        torch.stack(list(criterion(outputs, [target]).values())).sum().backward()
        peak = counted.peak
    network.zero_grad(set_to_none=True)
    return peak + image.nbytes


def inference_peak(network: nn.Module, image: Tensor, amp: Any) -> int:
    """Most bytes that one image takes in a prediction, the weights not; arguments as for `training_peak`."""
    network.eval()
    with LivePeak() as counted, torch.inference_mode(), torch.autocast("cpu", amp, enabled=amp is not None):
        network(image)
        return counted.peak + image.nbytes


def weight_bytes(network: nn.Module) -> int:
    """Bytes of a network's weights and buffers."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
