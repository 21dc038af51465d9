"""Ignite handlers of a training: validation, early stop, checkpoints, CSV logs, progress. Each has `attach(engine)`.

They use the trainer's public face only and may be given in any order. Where several processes train together, all have
the same handlers and take the same decisions; the first one validates, writes and shows. Handlers must not know models,
data or what a metric means.
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

import torch
from ignite.engine import Events
from tqdm import tqdm

from seg3d_monai.data.memory_limit import peak_memory
from seg3d_monai.engine.checkpoint import (
    SPACING,
    read_checkpoint,
    read_last,
    write_checkpoint,
    write_last,
    write_weights,
)
from seg3d_monai.engine.evaluator import VolumeEvaluator
from seg3d_monai.engine.replicas import from_first, num_processes, rank, reduce_numbers
from seg3d_monai.engine.trainer import InstanceTrainer, TrainerEvents

__all__ = ["Checkpoints", "CsvLog", "EarlyStopping", "LossMeans", "Progress", "Validation"]

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
        state, found = engine.state, None
        with engine.evaluated_weights():
            if rank() == 0:
                self.validator.run(state.epoch)
                found = dict(self.validator.state.metrics), float(self.validator.key_metric)
        state.metrics, key_metric = from_first(found)
        state.key_metric_name = self.validator.state.key_metric_name
        state.validated_iteration = state.iteration
        state.key_metrics = (*state.key_metrics, key_metric)
        if state.best_metric_epoch == -1 or key_metric > state.best_metric:
            state.best_metric, state.best_metric_epoch = key_metric, state.epoch
        self._validated_at = engine.elapsed
        engine.fire_event(TrainerEvents.VALIDATED)


class EarlyStopping:
    """End a training whose key metric has not risen for some validations; ended so, a resumed one ends at once.

    Ignite's handler of this name counts as it goes, so that a checkpoint would have to hold its count, and be written
    after it. This one counts anew over all validations, which the trainer's state keeps.

    Args:
        patience: validations without a rise after which the training ends, > 0.
        min_delta: what the metric has to rise by, above the one that last counted as a rise, >= 0.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(self, *, patience: int, min_delta: float = 0.0) -> None:
        if patience < 1 or min_delta < 0:
            raise ValueError(f"patience={patience}, min_delta={min_delta}: give validations > 0 and a rise >= 0")
        self.patience = patience
        self.min_delta = min_delta

    def attach(self, engine: InstanceTrainer) -> None:
        """Listen for validations and, after a resume, for the first epoch."""
        engine.add_event_handler(TrainerEvents.VALIDATED, self._stop_if_due)
        engine.add_event_handler(Events.EPOCH_STARTED, self._stop_if_due)

    def _stop_if_due(self, engine: InstanceTrainer) -> None:
        best, waited = float("-inf"), 0
        for metric in engine.state.key_metrics:
            risen = metric > best + self.min_delta
            best, waited = (metric, 0) if risen else (best, waited + 1)
        if waited >= self.patience:
            logger.info("the key metric has not risen above %.4g for %d validations: the training ends", best, waited)
            engine.terminate()


class Checkpoints:
    """Save the last and the best state under output_dir, and go on from the last one.

    Files: `last.pt` and, before, `last.prev.pt`; `best.pt` at the best validation; `model.pt`, the weights of best.pt
    (averaged ones, if there are), or the last ones as long as nothing was validated; where wanted, `step_NNNNNN.pt` of
    that many optimizer steps.

    Args:
        output_dir: folder of the run; made if missing. Resuming trusts what lies there.
        resume: go on from the last checkpoint, if there is one. A file, such as a `step_NNNNNN.pt`, is gone on from
            where output_dir has no last one. The words true and false, as a shell gives them, are no files.
        minutes: training minutes between saves of the last state, >= 0; it is also saved at validations and at the end.
        snapshot_steps: optimizer steps between states that are kept as `step_NNNNNN.pt`, > 0; None keeps none.
        snapshot_minutes: the same in training minutes, > 0; both may be given.
        keep: how many of these are kept, the newest, > 0; None keeps all.
        spacing_um: (z, y, x) micrometres per voxel of the crops, kept in each file; None where they have no common one.
    """

    def __init__(
        self,
        *,
        output_dir: str | Path,
        resume: bool | str | Path = True,
        minutes: float = 5.0,
        snapshot_steps: int | None = None,
        snapshot_minutes: float | None = None,
        keep: int | None = 3,
        spacing_um: Sequence[float] | None = None,
    ) -> None:
        given = {"snapshot_steps": snapshot_steps, "snapshot_minutes": snapshot_minutes, "keep": keep}
        for name, value in given.items():
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} is not positive; give a number > 0, or null")
        self.folder = Path(output_dir)
        self.resume = {"true": True, "false": False}.get(str(resume).lower(), resume)
        self.minutes = minutes
        self.snapshot_steps = snapshot_steps
        self.snapshot_minutes = snapshot_minutes
        self.keep = keep
        self.spacing_um = None if spacing_um is None else [float(size) for size in spacing_um]
        self._saved_at = self._snapshot_at = 0.0
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
        if state is None and self.resume and not isinstance(self.resume, bool):
            state = read_checkpoint(self.resume)
        if state is not None:
            engine.restore(state)
            self._saved = engine.state.iteration, engine.state.validated_iteration
            logger.info(
                "going on at epoch %d, iteration %d, from %s", engine.state.epoch, engine.state.iteration, self.folder
            )
        self._best_epoch = engine.state.best_metric_epoch
        self._saved_at = self._snapshot_at = engine.elapsed

    def _iteration_completed(self, engine: InstanceTrainer) -> None:
        if not engine.at_step:
            return
        if engine.elapsed - self._saved_at >= 60 * self.minutes:
            self._save(engine)
        by_steps = self.snapshot_steps is not None and engine.num_steps % self.snapshot_steps == 0
        minutes = self.snapshot_minutes
        if by_steps or (minutes is not None and engine.elapsed - self._snapshot_at >= 60 * minutes):
            self._save_snapshot(engine)

    def _save(self, engine: InstanceTrainer) -> None:
        now = engine.state.iteration, engine.state.validated_iteration
        if now == self._saved:
            return
        state = self._state(engine)
        best = engine.state.best_metric_epoch
        if best != self._best_epoch or best == -1:
            with engine.evaluated_weights() as weights:
                if rank() == 0:
                    write_weights(self.folder / "model.pt", weights, self.spacing_um)
        if rank() == 0:
            if best != self._best_epoch:
                write_checkpoint(self.folder / "best.pt", state)
            write_last(self.folder, state)
        self._saved = now
        self._best_epoch = best
        self._saved_at = engine.elapsed

    def _save_snapshot(self, engine: InstanceTrainer) -> None:
        state = self._state(engine)
        self._snapshot_at = engine.elapsed
        if rank() != 0:
            return
        write_checkpoint(self.folder / f"step_{engine.num_steps:06d}.pt", state)
        names = (path.stem.removeprefix("step_") for path in self.folder.glob("step_*.pt"))
        numbers = sorted(int(name) for name in names if name.isdecimal())
        passed = [number for number in numbers if number <= engine.num_steps]  # later ones are another run's
        for number in passed[: -self.keep] if self.keep else ():
            (self.folder / f"step_{number:06d}.pt").unlink(missing_ok=True)

    def _state(self, engine: InstanceTrainer) -> dict[str, Any]:
        return engine.checkpoint() | {SPACING: self.spacing_um}


class LossMeans:
    """Means of the losses since they were last taken, over iterations and over processes."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._count = 0

    def add(self, output: dict[str, float]) -> None:
        """Take in the losses of an iteration."""
        for name, value in output.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1

    def take(self) -> dict[str, float]:
        """The mean of each loss; all processes call it at the same iteration."""
        totals = reduce_numbers(list(self._sums.values()), "SUM")
        count = self._count * num_processes()
        means = {name: total / count for name, total in zip(self._sums, totals, strict=True)}
        self._sums, self._count = {}, 0
        return means


class CsvLog:
    """Write `train.csv` (means over an interval) and `validation.csv` under output_dir; a resumed run goes on in them.

    Beside the clock stand the peaks of memory since the process began, in 1e9 bytes: `memory_gb` of the process (empty
    on Windows), `cuda_memory_gb` of torch's allocator where a GPU is used. Both are of the first process.

    Args:
        output_dir: folder of the run; made if missing.
        interval: iterations a row of train.csv, > 0.
    """

    def __init__(self, *, output_dir: str | Path, interval: int = 10) -> None:
        if interval < 1:
            raise ValueError(f"interval={interval} is not positive; give the iterations a row")
        self.folder = Path(output_dir)
        self.interval = interval
        self._means = LossMeans()
        self._known: set[Path] = set()

    def attach(self, engine: InstanceTrainer) -> None:
        """Listen for iterations and validations."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(TrainerEvents.VALIDATED, self._validated)

    def _iteration_completed(self, engine: InstanceTrainer) -> None:
        self._means.add(engine.state.output[0])
        if engine.state.iteration % self.interval == 0:
            rate = engine.optimizer.param_groups[0]["lr"]
            self._write("train.csv", engine, {"lr": rate} | self._means.take())

    def _validated(self, engine: InstanceTrainer) -> None:
        self._write("validation.csv", engine, dict(engine.state.metrics))

    def _write(self, name: str, engine: InstanceTrainer, values: dict[str, Any]) -> None:
        if rank() != 0:
            return
        state, path = engine.state, self.folder / name
        row = {
            "epoch": state.epoch,
            "iteration": state.iteration,
            "elapsed_seconds": round(engine.elapsed, 3),
            **_peaks_gb(),
            **values,
        }
        if path not in self._known:  # rows that an earlier run wrote after the checkpoint would come twice
            self._known.add(path)
            self.folder.mkdir(parents=True, exist_ok=True)
            kept: list[dict[str, Any]] = []
            if path.exists():
                lines = path.read_bytes().decode().splitlines(keepends=True)
                whole = [line for line in lines if line.endswith("\n")]  # a run that was killed may leave half a row
                kept = [old for old in csv.DictReader(whole) if int(old["iteration"]) < state.iteration]
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
                writer.writerows({key: old.get(key, "") for key in row} for old in kept)
        with path.open("a", newline="") as file:
            csv.DictWriter(file, list(row)).writerow(row)


def _peaks_gb() -> dict[str, float | None]:
    peak = peak_memory()
    peaks = {"memory_gb": None if peak is None else round(peak / 1e9, 3)}
    if torch.cuda.is_initialized():
        peaks["cuda_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    return peaks


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
        if rank() != 0:
            return
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
        output = engine.state.output[0] if engine.state.output else {}
        shown = {"loss": output["loss"]} if "loss" in output else output
        values = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()
        ]
        return ", ".join([f"{timedelta(seconds=round(left))} left", f"epoch {engine.state.epoch}", *values])
