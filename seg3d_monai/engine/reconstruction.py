"""Validation and evaluation of a pre-training: how much of what is hidden in unseen crops a network knows.

This module must not know models: the network is called as in training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import Evaluator
from torch import Tensor, nn

from seg3d_monai.engine.checkpoint import load_weights, replace_file
from seg3d_monai.engine.replicas import rank
from seg3d_monai.inference.precision import autocast_dtype

__all__ = ["ReconstructionEvaluator", "ReconstructionReport"]


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


class ReconstructionReport:
    """Score the weights of a pre-training; what the bundle's evaluation does.

    Args:
        evaluator: over the crops; its network is `network`.
        network: receives the weights.
        output_dir: `metrics.json` is written there; made if missing.
        checkpoint: file of the weights, as `load_weights` takes it.
    """

    def __init__(
        self, *, evaluator: ReconstructionEvaluator, network: nn.Module, output_dir: str | Path, checkpoint: str | Path
    ) -> None:
        self.evaluator, self.network = evaluator, network
        self.output_dir, self.checkpoint = Path(output_dir), checkpoint

    def final(self) -> None:
        """Load the weights, evaluate, write `metrics.json` and print `explained = 0.xxx` as the last line.

        Of several processes, the first one does.

        Raises:
            FileNotFoundError, ValueError: as `load_weights`.
            ValueError: there is no crop to evaluate.
        """
        if rank() > 0:
            return
        load_weights(self.network, self.checkpoint).eval()
        if not self.evaluator.state.epoch_length:
            raise ValueError("evaluate_split holds no crop; name a split that the data have, such as val or train")
        self.evaluator.run()
        metrics = self.evaluator.state.metrics
        text = json.dumps(metrics, indent=2)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        replace_file(self.output_dir / "metrics.json", lambda file: file.write(text.encode()))
        print(f"explained = {metrics[self.evaluator.key_metric_name]:.3f}", flush=True)
