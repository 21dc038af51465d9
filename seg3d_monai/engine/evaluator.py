"""Evaluation on whole volumes with the instance metrics, and the line that a training ends with.

Each volume is predicted by the same blocks and stitching as a stack (inference.predict_labels) and compared with its
label volume; counts are pooled over the volumes. This module must not know models: a predictor is any callable of the
inference room. What is evaluated when, and with which weights, is decided by handlers.py and by `FinalReport`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import EventEnum, Events
from monai.engines import Evaluator
from torch import nn
from torch.utils.data import DataLoader

from seg3d_monai.engine.checkpoint import load_weights, replace_file
from seg3d_monai.engine.replicas import rank
from seg3d_monai.inference import predict_labels
from seg3d_monai.inference.blocks import check_sizes
from seg3d_monai.metrics import InstanceMetrics

__all__ = ["EvaluatorEvents", "FinalReport", "VolumeEvaluator", "named_metrics"]

logger = logging.getLogger(__name__)


class EvaluatorEvents(EventEnum):
    """Events of VolumeEvaluator beside Ignite's own."""

    PREDICTED = "predicted"
    """A volume is predicted: until the handlers end, `state.truth` and `state.prediction` are its labels [Z, Y, X]."""


class VolumeEvaluator(Evaluator):
    """Predict every volume of a dataset and score the instances.

    After `run()`, `state.metrics` holds "f1_10", "f1_25", "f1_50", "f1_55" … "f1_95", "precision_50", "recall_50",
    "map", "seg", "mucov", "aji" and "foreground_iou", and `state.report` the full dictionary of `seg3d evaluate`.

    Args:
        dataset: of dicts {"volume": Volume, "label": Volume, "name": str, ...}; if it is empty, `run()` does nothing.
        predictor: block and roi -> Instances, as predict_volume takes it.
        block_size: voxels (z, y, x) a block owns; None predicts each volume in one block.
        halo: voxels (z, y, x) read around a block.
        key_metric: name of the metric that decides which weights are best; higher is better.
        val_handlers: objects with `attach(engine)`.

    Raises:
        ValueError, TypeError: a block_size or halo that cannot be used, before any volume is predicted.
    """

    def __init__(
        self,
        *,
        dataset: Sequence[dict[str, Any]],
        predictor: Callable[..., Any],
        block_size: Sequence[int] | None = None,
        halo: Sequence[int] | None = None,
        key_metric: str = "f1_50",
        val_handlers: Sequence[Any] = (),
    ) -> None:
        check_sizes(block_size, halo)
        loader: DataLoader = DataLoader(dataset, batch_size=None, collate_fn=_unchanged)  # type: ignore[arg-type]
        events: list[Any] = [EvaluatorEvents]
        super().__init__(device=torch.device("cpu"), val_data_loader=loader, decollate=False, event_names=events)
        self.predictor = predictor
        self.block_size = block_size
        self.halo = halo
        self.instance_metrics = InstanceMetrics()
        self.state.key_metric_name = key_metric
        self.add_event_handler(Events.EPOCH_STARTED, self.instance_metrics.reset)
        self.add_event_handler(Events.EPOCH_COMPLETED, self._compute)
        self._register_handlers(val_handlers)

    @property
    def progress(self) -> float:
        """Share of the volumes that are done, in [0, 1]."""
        return min(1.0, self.state.iteration / max(1, self.state.epoch_length))

    @property
    def key_metric(self) -> float:
        """The key metric of the last run.

        Raises:
            ValueError: if there is no metric of that name.
        """
        name, metrics = self.state.key_metric_name, self.state.metrics
        if name not in metrics:
            raise ValueError(f"key_metric={name!r} is not computed; choose one of {', '.join(sorted(metrics))}")
        return metrics[name]

    def _iteration(  # type: ignore[override]
        self, engine: VolumeEvaluator, batchdata: dict[str, Any]
    ) -> list[dict[str, Any]]:
        label = batchdata["label"]
        truth = label.read((0, 0, 0, *label.shape[1:]))[0]
        labels, table = predict_labels(batchdata["volume"], self.predictor, self.block_size, self.halo)
        self.instance_metrics.update(truth, np.asarray(labels))
        self.state.truth, self.state.prediction = truth, np.asarray(labels)
        self.fire_event(EvaluatorEvents.PREDICTED)
        self.state.truth = self.state.prediction = None  # volumes may be large
        return [{"name": batchdata["name"], "instances": len(table)}]

    def _compute(self) -> None:
        self.state.report = self.instance_metrics.compute()
        self.state.metrics = named_metrics(self.state.report)


def named_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """The metrics by the names that `VolumeEvaluator` gives them.

    Args:
        report: what `InstanceMetrics.compute` returns.
    """
    thresholds = report["thresholds"]
    metrics = {f"f1_{float(t) * 100:.0f}": at["f1"] for t, at in thresholds.items()}
    metrics |= {f"{name}_50": thresholds["0.5"][name] for name in ("precision", "recall")}
    return metrics | {name: report[name] for name in ("map", "seg", "mucov", "aji", "foreground_iou")}


class FinalReport:
    """Score the best weights on unseen volumes; the last step of a bundle's `training` list.

    Args:
        evaluator: over the unseen volumes; its predictor uses `network`.
        network: receives the best weights.
        output_dir: `metrics.json` is written there; made if missing.
        checkpoint: file of the weights, as `load_weights` takes it; by default `model.pt` in output_dir.
    """

    def __init__(
        self,
        *,
        evaluator: VolumeEvaluator,
        network: nn.Module,
        output_dir: str | Path,
        checkpoint: str | Path | None = None,
    ) -> None:
        self.evaluator = evaluator
        self.network = network
        self.output_dir = Path(output_dir)
        self.checkpoint = self.output_dir / "model.pt" if checkpoint is None else checkpoint

    def final(self) -> None:
        """Load the weights, evaluate, write `metrics.json` and print `F1@0.5 = 0.xxx` as the last line.

        Of several processes that train together, the first one does.
        """
        if rank() > 0:
            return
        if not self.evaluator.state.epoch_length:
            logger.warning("no volume is kept for the final report, so there is no F1; mark a specimen as split 'test'")
            return
        load_weights(self.network, self.checkpoint).eval()
        self.evaluator.run()
        text = json.dumps(self.evaluator.state.report, indent=2)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        replace_file(self.output_dir / "metrics.json", lambda file: file.write(text.encode()))
        metrics = self.evaluator.state.metrics
        print("\n".join(f"{name} = {metrics[name]:.3f}" for name in ("map", "seg", "mucov")))
        print(f"F1@0.5 = {metrics['f1_50']:.3f}", flush=True)


def _unchanged(item: dict[str, Any]) -> dict[str, Any]:
    return item
