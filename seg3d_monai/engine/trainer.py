"""The training engine: one iteration for every instance model whose criterion returns named losses.

A thin `SupervisedTrainer`: batches keep their list of targets (no decollation), the criterion's weighted losses are
summed, autocast also works on the CPU, and every random draw of an iteration follows from (seed, epoch, iteration). The
learning rate and the end follow `progress`, which counts steps or, with `max_minutes`, whichever of steps and time is
ahead. Validation, logs and files are the handlers' (handlers.py); this module must not know models, data or metrics.

Several processes may train together (replicas.py): each takes other batches, gradients are means over all, and whatever
decides what happens next, time, signals and losses that are not finite, is agreed on in every iteration.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from ignite.engine import EventEnum, Events
from monai.engines import SupervisedTrainer
from monai.inferers import Inferer, SimpleInferer
from torch import Tensor, nn

from seg3d_monai.data.freed_memory import keep_freed_memory
from seg3d_monai.engine.replicas import Replicas, num_processes, rank, reduce_numbers
from seg3d_monai.inference.precision import autocast_dtype

if TYPE_CHECKING:
    from seg3d_monai.engine.deepspeed import DeepSpeedReplicas

__all__ = ["InstanceTrainer", "TrainerEvents"]

OTHERS_LOSS = "loss of another process"
logger = logging.getLogger(__name__)


class TrainerEvents(EventEnum):
    """Events of InstanceTrainer beside Ignite's own."""

    VALIDATED = "validated"
    NOT_FINITE = "not_finite"
    """A batch or step is left out, or ends the training; `state.fault` is {"reason": text, "losses": {name: value}}."""


class InstanceTrainer(SupervisedTrainer):
    """Train a network on batches {"image": float [N,C,D,H,W], "targets": list of dicts, "crop_id": list, ...}.

    The network is called as `inferer(image, network, targets)`, by default `network(image, targets)`, under autocast;
    the criterion as `loss_function(outputs, targets)`, outside it. `state.output` is [{"loss": total, each named loss}]
    (MONAI's handlers want such a list: `from_engine(["loss"], first=True)`), and `state.key_metrics` the key metric of
    every validation so far.
    Where a step has several batches, in turn or in several processes, its gradient is the mean over batches. Then a
    criterion with a method `count(targets) -> {name: number}` gets the means of these numbers over the step's batches
    as third argument, so that sums are divided by what the whole step holds.

    Args:
        device: where the network is; batches are moved there. On the CPU the process keeps memory that it frees, see
            data/freed_memory.py.
        max_epochs: epochs planned, > 0; with max_minutes, the most.
        train_data_loader: iterable with a length, the same in every process; `set_epoch(epoch)` is called first if it
            has one.
        network: in train mode, (images, targets) -> dict of outputs.
        optimizer: over the network's parameters; the learning rates it comes with are the schedule's peaks.
        loss_function: (outputs, targets) -> {name: scalar}, already weighted.
        inferer: how the network is called; MONAI's SimpleInferer by default.
        amp: "auto", "off", "bf16" or "fp16" (with gradient scaling); see `autocast_dtype`.
        accumulation_steps: batches an optimizer step, >= 1; an epoch's last step may have fewer.
        clip_norm: largest gradient norm of a step, > 0; None does not clip.
        on_nonfinite: "stop" raises at a loss or gradient that is not finite, "skip" leaves the batch or step out.
        schedule: progress in [0, 1] -> factor of the learning rates; None keeps them.
        max_minutes: wall-clock minutes, validation included, summed over resumed runs; None counts steps only.
        ema_decay: decay a step, in (0, 1), of the averaged weights that are evaluated and shipped; None does without.
        deepspeed: settings of DeepSpeed (its JSON), which then trains the network; see deepspeed.py. None does without.
        seed: start of every random draw.
        train_handlers: objects with `attach(engine)`.
        clock: seconds that only grow; for tests.

    Raises:
        ValueError: if an argument is out of its range, or the loader is empty or has no length.
        ImportError: if there are settings of DeepSpeed and it is not installed.
    """

    def __init__(
        self,
        *,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: Iterable[dict[str, Any]],
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_function: Callable[[Any, list[dict[str, Tensor]]], dict[str, Tensor]],
        inferer: Inferer | None = None,
        amp: str = "off",
        accumulation_steps: int = 1,
        clip_norm: float | None = None,
        on_nonfinite: str = "stop",
        schedule: Callable[[float], float] | None = None,
        max_minutes: float | None = None,
        ema_decay: float | None = None,
        deepspeed: dict[str, Any] | None = None,
        seed: int = 0,
        train_handlers: Sequence[Any] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        device = torch.device(device)
        _require(isinstance(max_epochs, int) and max_epochs > 0, "max_epochs", max_epochs, "an integer > 0")
        is_count = isinstance(accumulation_steps, int) and accumulation_steps > 0
        _require(is_count, "accumulation_steps", accumulation_steps, "an integer > 0")
        _require(clip_norm is None or _is_positive(clip_norm), "clip_norm", clip_norm, "a number > 0, or None")
        _require(on_nonfinite in ("stop", "skip"), "on_nonfinite", on_nonfinite, "'stop' or 'skip'")
        _require(max_minutes is None or _is_positive(max_minutes), "max_minutes", max_minutes, "a number > 0, or None")
        in_range = ema_decay is None or (_is_positive(ema_decay) and ema_decay < 1)
        _require(in_range, "ema_decay", ema_decay, "a number in (0, 1), or None")
        if device.type == "cpu":
            keep_freed_memory()
        count = getattr(loss_function, "count", None)
        self._loader = _StepLoader(train_data_loader, accumulation_steps, count)
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=self._loader,
            network=network,
            optimizer=optimizer,
            loss_function=loss_function,
            inferer=inferer or SimpleInferer(),
            decollate=False,
            event_names=[TrainerEvents],
            accumulation_steps=accumulation_steps,
        )
        _require(
            self.state.epoch_length > 0, "train_data_loader", train_data_loader, "a loader with at least one batch"
        )
        self.state.seed = seed
        self.state.validated_iteration = 0
        self.state.key_metrics = ()
        self.amp_type = autocast_dtype(amp, device)
        self.replicas: Replicas | DeepSpeedReplicas
        if deepspeed is None:
            scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
            self.replicas = Replicas(network, optimizer, scaler)
        else:
            from seg3d_monai.engine.deepspeed import DeepSpeedReplicas, fill_settings

            batch_size = getattr(train_data_loader, "batch_size", None)
            filled = fill_settings(deepspeed, self.amp_type, accumulation_steps, clip_norm, batch_size)
            self.replicas = DeepSpeedReplicas(network, optimizer, filled, device, self.amp_type)
        self.clip_norm = clip_norm
        self.on_nonfinite = on_nonfinite
        self.schedule = schedule
        self.max_minutes = max_minutes
        self.ema = self.replicas.average(ema_decay) if ema_decay else None
        self.stopped_by: signal.Signals | None = None
        self._signalled = 0
        self._is_running = False
        self._peak_rates = [group["lr"] for group in optimizer.param_groups]
        self._clock = clock
        self._started = clock()
        self._elapsed_before = 0.0
        self._agreed_elapsed = 0.0
        self.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        self.add_event_handler(Events.ITERATION_COMPLETED, self._stop_if_due)
        self._register_handlers(train_handlers)

    @property
    def elapsed(self) -> float:
        """Seconds of training, earlier runs included; with several processes the first one's at the last batch."""
        return self._own_elapsed if num_processes() == 1 else self._agreed_elapsed

    @property
    def _own_elapsed(self) -> float:
        return self._elapsed_before + self._clock() - self._started

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]."""
        steps = self.state.iteration / (self.state.max_epochs * self.state.epoch_length)
        return min(1.0, max(steps, self.elapsed / (60 * self.max_minutes) if self.max_minutes else 0.0))

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the training so far, those of earlier runs and those left out included."""
        epochs, batches = divmod(self.state.iteration, self.state.epoch_length)
        return epochs * -(-self.state.epoch_length // self.accumulation_steps) + batches // self.accumulation_steps

    @property
    def at_step(self) -> bool:
        """Whether the current batch is the last of its optimizer step: between steps the state can be saved."""
        done = self.state.iteration % self.state.epoch_length
        return done % self.accumulation_steps == 0  # 0 at an epoch's end, where a short step is taken

    def run(self) -> None:  # type: ignore[override]
        """Train to the end. SIGTERM and Ctrl-C end it after the current step, checkpoint handlers save, then it exits.

        Raises:
            SystemExit: with 128 + the signal's number, after a signal.
            FloatingPointError: at a loss or gradient that is not finite, unless they are skipped.
        """
        self._started = self._clock()
        self.stopped_by, self._signalled, self._is_running = None, 0, True
        try:
            with self._signals():
                super().run()
        finally:
            self._is_running = False
        if self.stopped_by is not None:
            raise SystemExit(128 + self.stopped_by)

    def stop(self, number: int) -> bool:
        """End a run after its current step as this signal would; from another thread, too.

        Args:
            number: of the signal.

        Returns:
            Whether a run is going on.
        """
        if self._is_running:
            self._signalled = number
            if num_processes() == 1:
                self.stopped_by = signal.Signals(number)
            logger.warning("%s: stopping after this step", signal.Signals(number).name)
        return self._is_running

    @contextmanager
    def evaluated_weights(self) -> Iterator[dict[str, Tensor]]:
        """Give the network the averaged weights, if any, and eval mode, within a `with`; yields its state dict.

        Every process calls it: under DeepSpeed each holds a part of the weights.
        """
        training = self.network.training
        self.network.eval()
        try:
            with self.replicas.evaluated(self.ema):  # type: ignore[arg-type]
                yield self.network.state_dict()
        finally:
            self.network.train(training)

    def checkpoint(self) -> dict[str, Any]:
        """Everything that a later run needs to go on with the same bits: plain tensors, numbers and strings.

        Every process calls it; under DeepSpeed only the first one gets the tensors.
        """
        numbers = ("iteration", "epoch_length", "seed", "best_metric", "best_metric_epoch", "validated_iteration")
        return {
            **self.replicas.state(self.ema),  # type: ignore[arg-type]
            "ema_steps": 0 if self.ema is None else self.ema.steps,
            "elapsed": self.elapsed,
            **{name: getattr(self.state, name) for name in (*numbers, "key_metrics")},
        }

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint; to be called before or at Events.STARTED.

        Raises:
            ValueError: if it was made by another network, optimizer, length of an epoch or with another use of EMA.
        """
        length = checkpoint["epoch_length"]
        mend = "start again in another output_dir, or with resume off"
        if length != self.state.epoch_length:
            raise ValueError(f"the checkpoint's epochs have {length} batches, now {self.state.epoch_length}; {mend}")
        if (checkpoint["ema"] is None) != (self.ema is None):
            raise ValueError(f"the checkpoint was made {'without' if self.ema else 'with'} ema_decay; {mend}")
        try:
            self.replicas.load(checkpoint, self.ema)  # type: ignore[arg-type]
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"the checkpoint is of another network or optimizer ({error}); {mend}") from error
        if self.ema is not None:
            self.ema.steps = checkpoint["ema_steps"]
        for name in ("iteration", "best_metric", "best_metric_epoch", "validated_iteration"):
            setattr(self.state, name, checkpoint[name])
        self.state.key_metrics = tuple(checkpoint.get("key_metrics", ()))
        self.state.epoch, self._loader.skip = divmod(self.state.iteration, length)
        self._elapsed_before = self._agreed_elapsed = checkpoint["elapsed"]
        if self.progress >= 1:
            self.terminate()

    def _iteration(self, engine: Any, batchdata: dict[str, Any]) -> list[dict[str, float]]:  # type: ignore[override]
        self._seed_everything()
        if not self.network.training:
            self.network.train()
        position = (self.state.iteration - 1) % self.state.epoch_length
        first = position - position % self.accumulation_steps
        if position == first:
            self._set_learning_rate()
        image = batchdata["image"].to(self.state.device, non_blocking=True)
        targets = [{k: v.to(self.state.device, non_blocking=True) for k, v in t.items()} for t in batchdata["targets"]]
        with self.replicas.batch(is_first=position == first, is_last=self.at_step):
            with torch.autocast(self.state.device.type, self.amp_type, enabled=self.amp_type is not None):
                outputs = self.inferer(image, self.replicas.module, targets)
            losses = self.loss_function(outputs, targets, *batchdata.get("counts", ()))
            total = torch.stack(list(losses.values())).sum()
            values = torch.stack([total, *losses.values()]).detach().double().tolist()  # one transfer from the device
            output = dict(zip(("loss", *losses), values, strict=True))
            if self._all_go_on(math.isfinite(values[0])):
                batches = min(self.accumulation_steps, self.state.epoch_length - first)
                self.replicas.backward(total / batches)
            else:
                reason = f"loss {output}" if not math.isfinite(values[0]) else OTHERS_LOSS
                self._not_finite(reason, batchdata.get("crop_id"), output)
                self.replicas.leave_out(total, is_last=self.at_step)
        if self.at_step:
            self._step(batchdata.get("crop_id"), output)
        return [output]

    def _all_go_on(self, is_finite: bool) -> bool:
        """Whether the loss is finite in every process; agrees on the time and on signals too."""
        own_time = self._own_elapsed if rank() == 0 else 0.0
        not_finite, self._agreed_elapsed, number = reduce_numbers([not is_finite, own_time, self._signalled], "MAX")
        if number:
            self.stopped_by = signal.Signals(int(number))
        return not not_finite

    def _step(self, crops: Any, losses: dict[str, float]) -> None:
        norm = self.replicas.step(self.clip_norm)
        if norm is None:  # every batch of the step was left out
            return
        if not (self.replicas.is_scaled or norm.isfinite()):
            self._not_finite(f"gradient norm {norm.item()}", crops, losses)
            return
        if self.ema is not None:
            self.ema.update()

    def _not_finite(self, reason: str, crops: Any, losses: dict[str, float]) -> None:
        self.state.fault = {"reason": reason, "losses": losses}
        self.fire_event(TrainerEvents.NOT_FINITE)
        message = f"epoch {self.state.epoch}, iteration {self.state.iteration}, crops {crops}: {reason} is not finite"
        if self.on_nonfinite == "stop":
            raise FloatingPointError(
                f"{message}; look at these crops, lower the learning rate or set on_nonfinite='skip'"
            )
        logger.warning("%s; left out", message)

    def _start_epoch(self) -> None:
        self._seed_everything()  # a sampler may draw its order from torch's generator
        self._loader.set_epoch(self.state.epoch)

    def _seed_everything(self) -> None:
        key = f"{self.state.seed} {self.state.rank} {self.state.epoch} {self.state.iteration}"
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest()))

    def _set_learning_rate(self) -> None:
        factor = 1.0 if self.schedule is None else self.schedule(self.progress)
        for group, peak in zip(self.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = peak * factor

    def _stop_if_due(self) -> None:
        planned = self.state.max_epochs * self.state.epoch_length
        if self.at_step and self.state.iteration < planned and (self.stopped_by is not None or self.progress >= 1):
            self.terminate()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn the first SIGTERM or SIGINT into an orderly stop; a second one acts at once."""

        owner = os.getpid()

        def remember(number: int, frame: Any) -> None:
            if os.getpid() != owner:  # a forked loader worker: Ctrl-C is its parent's affair, SIGTERM ends it
                if number == signal.SIGTERM:
                    os._exit(128 + number)
                return
            self.stop(number)
            signal.signal(number, before[number])

        before: dict[int, Any] = {}
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                before[number] = signal.signal(number, remember)
        except ValueError:  # signals belong to the main thread; elsewhere its owner decides
            pass
        try:
            yield
        finally:
            for restored, handler in before.items():
                signal.signal(restored, handler)


class _StepLoader:
    """A loader that can leave out the first batches of its next pass, which an earlier run has seen.

    Where an optimizer step has several batches, they are read together, and each gets "counts", a tuple of the means of
    its criterion's numbers over the batches of the step.
    """

    def __init__(
        self,
        loader: Iterable[dict[str, Any]],
        accumulation_steps: int,
        count: Callable[[list[dict[str, Tensor]]], dict[str, float]] | None,
    ) -> None:
        self.loader = loader
        self.skip = 0
        self._accumulation_steps = accumulation_steps
        self._count = count

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        skip, self.skip = self.skip, 0
        if skip and hasattr(self.loader, "skip"):
            self.loader.skip(skip)  # it need not read them
            skip = 0
        batches = islice(self.loader, skip, None)
        if self._count is None or self._accumulation_steps * num_processes() == 1:
            return batches
        return self._with_counts(batches, self._count)

    def _with_counts(
        self, batches: Iterator[dict[str, Any]], count: Callable[[list[dict[str, Tensor]]], dict[str, float]]
    ) -> Iterator[dict[str, Any]]:
        while step := list(islice(batches, self._accumulation_steps)):
            own = [count(batch["targets"]) for batch in step]
            totals = reduce_numbers([sum(numbers[name] for numbers in own) for name in own[0]], "SUM")
            means = {name: total / (len(step) * num_processes()) for name, total in zip(own[0], totals, strict=True)}
            for batch in step:
                yield {**batch, "counts": (means,)}

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)


def _is_positive(value: Any) -> bool:
    """Whether a value is a number > 0; in a shell "null" would be a word."""
    return isinstance(value, int | float) and value > 0


def _require(condition: bool, name: str, value: Any, mend: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r} cannot be used; give {mend}")
