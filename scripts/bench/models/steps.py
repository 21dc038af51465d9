"""A tiny model's training step against its floor, by turns, and how the step's time is divided."""

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.models.bars import Row
from bench.models.floor import KINDS, replay
from bench.models.training import Batch, Training, build, first_batches, read_config, settings_of, specimen_for
from bench.timing import TOUCHED_BYTES, synchronise, touch_memory

NUM_WARMUP, NUM_BATCHES = 10, 3
METHOD = (
    f"Step: the trainer's own iteration on a batch that is in memory, after {NUM_WARMUP} steps of training; "
    f"{NUM_BATCHES} batches by turns, of the built-in synthetic specimen if no data are given. Floor: every kernel "
    "call of the network's convolutions, linear layers, attention and batched products, forward and backward, recorded "
    "from that very step just before it (same weights, draws and tensors) and run alone; casts, sums for biases, "
    "norms, RoIAlign, NMS and the criterion's products are not in it. Each turn takes both, in changing order; times "
    "are medians of the turns, the ratio is the median of the turns' ratios. Parts are medians of further steps, one a "
    "turn, with a clock around each part; matching is within the criterion, backward is what no other part took."
)


def measure_steps(
    model: str,
    overlays: Sequence[str],
    dataset_dir: Path | None,
    device: str,
    repeats: int,
    is_quick: bool,
    folder: Path,
) -> Row:
    """One row: settings, instances, times and parts of a bundle's training step.

    Args:
        model: name of the bundle.
        overlays: names or files of overlays.
        dataset_dir: data to train on; None for the built-in specimen.
        device: "cpu" or "cuda".
        repeats: turns that count; one more comes before them.
        is_quick: tiny sizes.
        folder: where the specimen is, or is to be written, and the run's files.
    """
    data = specimen_for(folder, is_quick) if dataset_dir is None else dataset_dir
    changes = {"dataset_dir": str(data), "output_dir": str(folder / model), "device": device}
    parser = read_config(model, overlays, changes, is_quick)
    training = build(parser, device)
    num_warmup = 2 if is_quick else NUM_WARMUP
    batches = first_batches(parser, num_warmup + NUM_BATCHES)
    for batch in batches[:num_warmup]:
        training.step(batch)
    batches = batches[num_warmup:]
    if device == "cpu" and not is_quick:
        touch_memory(TOUCHED_BYTES)
    row: Row = {"model": model, "overlays": [Path(name).stem for name in overlays]}
    row |= {"settings": settings_of(parser, training.trainer), "changed_ids": sorted(changes)}
    row["instances_of_crops"] = [len(target["ids"]) for batch in batches for target in batch["targets"]]
    return row | compare(training, batches, repeats)


def compare(training: Training, batches: list[Batch], repeats: int) -> Row:
    """Times of steps, floors and parts; the first turn, which does not count, meets cold caches."""
    turns = []
    for number in range(repeats + 1):
        turns.append(one_turn(training, batches[number % len(batches)], number % 2 == 0))
        print(f"turn {number} of {repeats}", file=sys.stderr, flush=True)
    steps, kinds, parts, counts = zip(*turns[1:], strict=True)
    floors = [sum(seconds.values()) for seconds in kinds]
    return {
        "step_ms": statistics.median(steps) * 1e3,
        "floor_ms": statistics.median(floors) * 1e3,
        "times_floor": _median_ratio(steps, floors),
        "floor_kinds_ms": _medians_ms(kinds),
        "calls": counts[-1],
        "parts_ms": _medians_ms(parts),
        "step_runs_ms": [seconds * 1e3 for seconds in steps],
        "floor_runs_ms": [seconds * 1e3 for seconds in floors],
    }


def one_turn(
    training: Training, batch: Batch, is_step_first: bool
) -> tuple[float, dict[str, float], dict[str, float], dict[str, int]]:
    """Seconds of a step, of each kind in its floor and of the parts of another step; calls of each kind."""
    calls = training.record(batch)
    if is_step_first:
        step = _seconds(lambda: training.step(batch), training.device)
        kinds = replay(calls, training.device)
    else:
        kinds = replay(calls, training.device)
        step = _seconds(lambda: training.step(batch), training.device)
    counts = Counter(call.kind for call in calls)
    del calls  # they hold memory
    return step, kinds, step_in_parts(training, batch), {kind: counts[kind] for kind in KINDS}


def _median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _medians_ms(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) * 1e3 for key in rows[0]}


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def step_in_parts(training: Training, batch: Batch) -> dict[str, float]:
    """Seconds of one more step and of its parts; on a GPU each part is waited for, so the whole is slower there."""
    parts: Counter[str] = Counter()
    with _clocks(training, parts):
        whole = _seconds(lambda: training.step(batch), training.device)
    known = parts["forward"] + parts["criterion"] + parts["update"]
    return {
        "forward": parts["forward"],
        "criterion": parts["criterion"],
        "matching": parts["matching"],
        "backward": whole - known,
        "clip, optimizer, EMA": parts["update"],
        "whole": whole,
    }


@contextmanager
def _clocks(training: Training, parts: Counter[str]) -> Iterator[None]:
    """Within a `with`, add the seconds of the trainer's parts to `parts`."""
    trainer = training.trainer
    wrapped = [
        (trainer, "inferer", "forward"),
        (trainer, "loss_function", "criterion"),
        (trainer.loss_function, "matcher", "matching"),
        (trainer, "_step", "update"),
    ]

    def clocked(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            synchronise(training.device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronise(training.device)
            parts[part] += time.perf_counter() - start
            return result

        return run

    before = [(owner, name, getattr(owner, name)) for owner, name, _ in wrapped]
    try:
        for (owner, name, part), (_, _, function) in zip(wrapped, before, strict=True):
            setattr(owner, name, clocked(function, part))
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)
