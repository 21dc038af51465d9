"""Trainings that take a few steps at a time, so that two of them can be timed by turns on the same crops.

One is the engine: a trainer's own run, interrupted and gone on with through Ignite. The other is what one would write
without an engine: a plain loop over the same network, loader, criterion and optimizer, with the mathematics of the
bundle's training, learning rates, clipping and averaged weights, written out.
"""

import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from torch import nn

from bench.models.training import build
from seg3d_monai.engine import InstanceTrainer


class EngineRun:
    """A trainer's run with all its handlers, a few steps at a time.

    A step lasts from the end of the one before to its own end, so it includes the loader, Ignite and every handler;
    those of an epoch's end are in the step that follows.

    Args:
        trainer: has not run yet.

    Attributes:
        seconds: of each step so far.
        losses: of each step so far.
    """

    def __init__(self, trainer: InstanceTrainer) -> None:
        self.trainer = trainer
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._left = 0
        self._mark = 0.0
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._completed)  # comes after those of the trainer
        trainer.logger.setLevel(logging.CRITICAL)  # a run that is never gone on with is no error

    def take(self, count: int) -> None:
        """Train for so many steps."""
        self._left, self._mark = count, time.perf_counter()
        self.trainer.run()
        self.seconds[-1] += time.perf_counter() - self._mark  # to interrupt a run costs the engine, not the benchmark

    def _completed(self, engine: InstanceTrainer) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._mark)
        self._mark = now
        self.losses.append(engine.state.output[0]["loss"])
        self._left -= 1
        if self._left == 0:
            engine.interrupt()


class PlainLoop:
    """A plain loop over the parts of a trainer, a few steps at a time.

    Args:
        trainer: never runs itself.
        loader: its loader.

    Attributes:
        seconds: of each step so far.
        losses: of each step so far.
    """

    def __init__(self, trainer: InstanceTrainer, loader: Any) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._steps = plain_steps(trainer, loader)

    def take(self, count: int) -> None:
        """Train for so many steps."""
        mark = time.perf_counter()
        for loss in islice(self._steps, count):
            now = time.perf_counter()
            self.seconds.append(now - mark)
            self.losses.append(loss)
            mark = time.perf_counter()


def plain_steps(trainer: InstanceTrainer, loader: Any) -> Iterator[float]:
    """Train as a trainer would, of which only the parts are taken; yields the loss of each step."""
    network, criterion, optimizer, schedule = (
        trainer.network,
        trainer.loss_function,
        trainer.optimizer,
        trainer.schedule,
    )
    clip_norm, decay, amp_type, num_epochs = (
        trainer.clip_norm,
        trainer.ema.decay,
        trainer.amp_type,
        trainer.state.max_epochs,
    )
    parameters = list(network.parameters())
    averages = [parameter.detach().clone() for parameter in parameters]
    peaks = [group["lr"] for group in optimizer.param_groups]
    num_steps, step = num_epochs * len(loader), 0
    network.train()
    for epoch in range(1, num_epochs + 1):
        loader.set_epoch(epoch)
        for batch in loader:
            step += 1
            _seed(trainer, epoch, step)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * schedule(step / num_steps)
            optimizer.zero_grad()
            with torch.autocast("cpu", amp_type, enabled=amp_type is not None):
                outputs = network(batch["image"], batch["targets"])
            loss = torch.stack(list(criterion(outputs, batch["targets"]).values())).sum()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, clip_norm)
            optimizer.step()
            with torch.no_grad():
                decay_now = min(decay, step / (9 + step)) if step > 1 else 0.0
                torch._foreach_lerp_(averages, parameters, weight=1 - decay_now)
            yield loss.item()


def _seed(trainer: InstanceTrainer, epoch: int, step: int) -> None:
    """Seed the draws of a step as the trainer does."""
    trainer.state.epoch, trainer.state.iteration = epoch, step
    trainer._seed_everything()


def engine_run(parser: ConfigParser) -> EngineRun:
    """The run of a bundle's trainer."""
    return EngineRun(build(parser, "cpu").trainer)


def plain_loop(parser: ConfigParser) -> PlainLoop:
    """A plain loop that trains as a bundle does."""
    trainer = build(parser, "cpu").trainer
    return PlainLoop(trainer, parser.get_parsed_content("train#dataloader"))


def take_turns(trainings: Sequence[EngineRun | PlainLoop], turns: int, steps: int) -> None:
    """Let trainings take so many steps a turn, in an order that changes from turn to turn."""
    for turn in range(turns):
        for training in trainings if turn % 2 == 0 else reversed(trainings):
            training.take(steps)


def compare(ours: EngineRun | PlainLoop, baseline: EngineRun | PlainLoop, num_warmup: int) -> dict[str, Any]:
    """Times of the steps after the warm-up, and how losses differ.

    Returns:
        "ours_ms" and "baseline_ms", medians; "times_baseline", the median of the ratios of steps on the same crops;
        the times of all steps; "times_baseline_mean", the ratio of the means; "largest_deviation" of a loss, relative.
    """
    own, other = ours.seconds[num_warmup:], baseline.seconds[num_warmup:]
    deviations = [abs(a - b) / abs(b) for a, b in zip(ours.losses, baseline.losses, strict=True)]
    return {
        "ours_ms": statistics.median(own) * 1e3,
        "baseline_ms": statistics.median(other) * 1e3,
        "times_baseline": statistics.median(a / b for a, b in zip(own, other, strict=True)),
        "times_baseline_mean": sum(own) / sum(other),
        "largest_deviation": max(deviations),
        "ours_losses": ours.losses,
        "baseline_losses": baseline.losses,
        "first_loss": baseline.losses[0],
        "last_loss": baseline.losses[-1],
        "num_steps": len(own),
        "ours_runs_ms": [seconds * 1e3 for seconds in own],
        "baseline_runs_ms": [seconds * 1e3 for seconds in other],
    }
