"""Validation of a pre-training: how much of what is hidden in unseen crops a network knows.

This module must not know models: the network is called as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import Evaluator
from torch import Tensor, nn

from seg3d_monai.inference.precision import autocast_dtype

__all__ = ["ReconstructionEvaluator"]


class ReconstructionEvaluator(Evaluator):
    """Take the means of a criterion's losses over the batches of a loader; the same patches are hidden each time.

    After `run()`, `state.metrics` holds each loss by its name, and "explained", 1 minus their sum: the share of the
    variance that a network knows, where patches are normalised. It is the key metric.

    Args:
        loader: batches {"image" [N, C, D, H, W], "targets", ...}, such as a `CropLoader`.
        network: as in training.
        loss_function: (outputs, targets) -> {name: scalar}.
        device: where the network is.
        amp: as of `InstanceTrainer`.
        seed: of what is hidden.
    """

    key_metric_name = "explained"

    def __init__(
        self,
        *,
        loader: Iterable[dict[str, Any]],
        network: nn.Module,
        loss_function: Callable[[Any, Any], dict[str, Tensor]],
        device: torch.device | str,
        amp: str = "off",
        seed: int = 0,
    ) -> None:
        super().__init__(device=torch.device(device), val_data_loader=loader, decollate=False)
        self.network, self.loss_function, self.seed = network, loss_function, seed
        self.amp_type = autocast_dtype(amp, torch.device(device))
        self.state.key_metric_name = self.key_metric_name
        self._sums: dict[str, float] = {}
        self.add_event_handler(Events.EPOCH_STARTED, self._start)
        self.add_event_handler(Events.EPOCH_COMPLETED, self._compute)

    @property
    def key_metric(self) -> float:
        """Share of the variance that is known, of the last run."""
        return self.state.metrics[self.key_metric_name]

    def _start(self) -> None:
        self._sums = {}

    def _iteration(  # type: ignore[override]
        self, engine: ReconstructionEvaluator, batchdata: dict[str, Any]
    ) -> list[dict[str, float]]:
        image = batchdata["image"].to(self.state.device)
        with torch.random.fork_rng(devices=[image.device] if image.is_cuda else []), torch.no_grad():
            torch.manual_seed(self.seed + self.state.iteration)
            with torch.autocast(image.device.type, self.amp_type, enabled=self.amp_type is not None):
                outputs = self.network(image, batchdata["targets"])
            losses = {name: float(loss) for name, loss in self.loss_function(outputs, batchdata["targets"]).items()}
        for name, loss in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + loss
        return [losses]

    def _compute(self) -> None:
        means = {name: total / self.state.iteration for name, total in self._sums.items()}
        self.state.metrics = {**means, self.key_metric_name: 1 - sum(means.values())}
