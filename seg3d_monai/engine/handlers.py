"""Ignite handlers of a training: validation, checkpoints, CSV logs, progress. Each has `attach(engine)`.

They use the trainer's public face only and may be given in any order. They must not know models, data or what a metric
means.
"""

from __future__ import annotations

import csv
import logging
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from ignite.engine import Events
from tqdm import tqdm

from seg3d_monai.engine.checkpoint import SPACING, read_last, write_checkpoint, write_last, write_weights
from seg3d_monai.engine.evaluator import VolumeEvaluator
from seg3d_monai.engine.trainer import InstanceTrainer, TrainerEvents

__all__ = ["Checkpoints", "CsvLog", "Progress", "Validation"]

logger = logging.getLogger(__name__)


class Validation:
    """Evaluate the (averaged) weights during a training and at its end; fires `TrainerEvents.VALIDATED`.

    Args:
        validator: evaluates; if its dataset is empty there is no validation and the last weights are the best.
        interval: epochs between validations, > 0; ignored with minutes.
        minutes: training minutes between validations, each at the end of an epoch.

    Raises:
        ValueError: if interval or minutes is not positive.
    """

    def __init__(self, *, validator: VolumeEvaluator, interval: int = 1, minutes: float | None = None) -> None:
        if interval < 1 or (minutes is not None and minutes <= 0):
            raise ValueError(
                f"interval={interval}, minutes={minutes}: validation needs positive numbers; minutes may be null"
            )
        self.validator = validator
        self.interval = interval
        self.minutes = minutes
        self._validated_at = 0.0

    def attach(self, engine: InstanceTrainer) -> None:
        """Listen for the ends of epochs and of the training."""
        if not self.validator.state.epoch_length:
            logger.warning("there is no volume to validate on: the last weights will count as the best")
            return
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def _epoch_completed(self, engine: InstanceTrainer) -> None:
        if self.minutes is None:
            due = engine.state.epoch % self.interval == 0
        else:
            due = engine.elapsed - self._validated_at >= 60 * self.minutes
        if due:
            self._validate(engine)

    def _completed(self, engine: InstanceTrainer) -> None:
        if engine.stopped_by is None and engine.state.validated_iteration != engine.state.iteration:
            self._validate(engine)

    def _validate(self, engine: InstanceTrainer) -> None:
        state = engine.state
        with engine.evaluated_weights():
            self.validator.run(state.epoch)
        state.metrics = dict(self.validator.state.metrics)
        state.key_metric_name = self.validator.state.key_metric_name
        state.validated_iteration = state.iteration
        if state.best_metric_epoch == -1 or self.validator.key_metric > state.best_metric:
            state.best_metric, state.best_metric_epoch = float(self.validator.key_metric), state.epoch
        self._validated_at = engine.elapsed
        engine.fire_event(TrainerEvents.VALIDATED)


class Checkpoints:
    """Save the last and the best state under output_dir, and go on from the last one.

    Files: `last.pt` and, before, `last.prev.pt`; `best.pt` at the best validation; `model.pt`, the weights of best.pt
    (averaged ones, if there are), or the last ones as long as nothing was validated.

    Args:
        output_dir: folder of the run; made if missing. Resuming trusts what lies there.
        resume: go on from the last checkpoint, if there is one.
        minutes: training minutes between saves of the last state, >= 0; it is also saved at validations and at the end.
        spacing_um: (z, y, x) micrometres per voxel of the crops, kept in each file; None where they have no common one.
    """

    def __init__(
        self,
        *,
        output_dir: str | Path,
        resume: bool = True,
        minutes: float = 5.0,
        spacing_um: Sequence[float] | None = None,
    ) -> None:
        self.folder = Path(output_dir)
        self.resume = resume
        self.minutes = minutes
        self.spacing_um = None if spacing_um is None else [float(size) for size in spacing_um]
        self._saved_at = 0.0
        self._saved: tuple[int, int] | None = None
        self._best_epoch = -1

    def attach(self, engine: InstanceTrainer) -> None:
        """Listen for the start, optimizer steps, validations and the end."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(TrainerEvents.VALIDATED, self._save)
        engine.add_event_handler(Events.COMPLETED, self._save)

    def _started(self, engine: InstanceTrainer) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = read_last(self.folder) if self.resume else None
        if state is not None:
            engine.restore(state)
            self._saved = engine.state.iteration, engine.state.validated_iteration
            logger.info(
                "going on at epoch %d, iteration %d, from %s", engine.state.epoch, engine.state.iteration, self.folder
            )
        self._best_epoch = engine.state.best_metric_epoch
        self._saved_at = engine.elapsed

    def _iteration_completed(self, engine: InstanceTrainer) -> None:
        if engine.at_step and engine.elapsed - self._saved_at >= 60 * self.minutes:
            self._save(engine)

    def _save(self, engine: InstanceTrainer) -> None:
        now = engine.state.iteration, engine.state.validated_iteration
        if now == self._saved:
            return
        state = engine.checkpoint() | {SPACING: self.spacing_um}
        best = engine.state.best_metric_epoch
        if best != self._best_epoch or best == -1:
            with engine.evaluated_weights() as weights:
                write_weights(self.folder / "model.pt", weights, self.spacing_um)
        if best != self._best_epoch:
            write_checkpoint(self.folder / "best.pt", state)
        write_last(self.folder, state)
        self._saved = now
        self._best_epoch = best
        self._saved_at = engine.elapsed


class CsvLog:
    """Write `train.csv` (means over an interval) and `validation.csv` under output_dir; a resumed run goes on in them.

    Args:
        output_dir: folder of the run; made if missing.
        interval: iterations a row of train.csv, > 0.
    """

    def __init__(self, *, output_dir: str | Path, interval: int = 10) -> None:
        if interval < 1:
            raise ValueError(f"interval={interval} is not positive; give the iterations a row")
        self.folder = Path(output_dir)
        self.interval = interval
        self._sums: dict[str, float] = {}
        self._count = 0
        self._known: set[Path] = set()

    def attach(self, engine: InstanceTrainer) -> None:
        """Listen for iterations and validations."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(TrainerEvents.VALIDATED, self._validated)

    def _iteration_completed(self, engine: InstanceTrainer) -> None:
        for name, value in engine.state.output.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        if engine.state.iteration % self.interval == 0:
            row = {"lr": engine.optimizer.param_groups[0]["lr"]}
            self._write("train.csv", engine, row | {name: total / self._count for name, total in self._sums.items()})
            self._sums, self._count = {}, 0

    def _validated(self, engine: InstanceTrainer) -> None:
        self._write("validation.csv", engine, dict(engine.state.metrics))

    def _write(self, name: str, engine: InstanceTrainer, values: dict[str, Any]) -> None:
        state, path = engine.state, self.folder / name
        row = {
            "epoch": state.epoch,
            "iteration": state.iteration,
            "elapsed_seconds": round(engine.elapsed, 3),
            **values,
        }
        if path not in self._known:  # rows that an earlier run wrote after the checkpoint would come twice
            self._known.add(path)
            self.folder.mkdir(parents=True, exist_ok=True)
            kept: list[dict[str, Any]] = []
            if path.exists():
                with path.open(newline="") as file:
                    kept = [old for old in csv.DictReader(file) if int(old["iteration"]) < state.iteration]
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
                writer.writerows({key: old.get(key, "") for key in row} for old in kept)
        with path.open("a", newline="") as file:
            csv.DictWriter(file, list(row)).writerow(row)


class Progress:
    """Show share done, time left and the last output on stderr, for a trainer or an evaluator.

    A bar on a terminal; elsewhere, a line every few seconds.

    Args:
        name: what is shown before the bar.
        seconds: time between lines where there is no terminal.
    """

    def __init__(self, *, name: str = "training", seconds: float = 15.0) -> None:
        self.name = name
        self.seconds = seconds
        self._bar: tqdm | None = None
        self._begun = self._shown_at = self._begun_progress = 0.0

    def attach(self, engine: InstanceTrainer | VolumeEvaluator) -> None:
        """Listen for the start, iterations and the end."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def _started(self, engine: InstanceTrainer | VolumeEvaluator) -> None:
        self._begun = self._shown_at = time.monotonic()
        self._begun_progress = engine.progress
        if sys.stderr.isatty():
            self._bar = tqdm(
                desc=self.name, total=1.0, bar_format="{desc}: {percentage:3.0f}%|{bar}|{postfix}", leave=False
            )

    def _iteration_completed(self, engine: InstanceTrainer | VolumeEvaluator) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(self._text(engine), refresh=False)
            self._bar.update(engine.progress - self._bar.n)
        elif time.monotonic() - self._shown_at >= self.seconds:
            self._shown_at = time.monotonic()
            print(f"{self.name}: {engine.progress:.0%}, {self._text(engine)}", file=sys.stderr, flush=True)

    def _completed(self, engine: InstanceTrainer | VolumeEvaluator) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        print(f"{self.name}: done, {self._text(engine)}", file=sys.stderr, flush=True)

    def _text(self, engine: InstanceTrainer | VolumeEvaluator) -> str:
        done = engine.progress - self._begun_progress
        left = (time.monotonic() - self._begun) * (1 - engine.progress) / done if done > 0 else 0.0
        output = engine.state.output or {}
        shown = {"loss": output["loss"]} if "loss" in output else output
        values = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
        ]
        return ", ".join([f"{timedelta(seconds=round(left))} left", f"epoch {engine.state.epoch}", *values])
