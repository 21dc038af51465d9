"""Wall times of several contenders, measured in turn, so that what else the machine does hits all of them alike."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

SLOW_S = 4.0
"""A baseline whose first run takes longer than this is not run again: that run is its time."""
BUDGET_S = 6.0
"""About how long the repeated runs of one row may take together, slow baseline aside."""

TOUCHED_BYTES = 4 * 2**30
"""Memory to touch before a row: about what the most demanding baseline takes."""


@dataclass
class Timing:
    """The runs of one contender: their times in seconds, and what the last run returned."""

    seconds: list[float] = field(default_factory=list)
    result: Any = None

    @property
    def runs_ms(self) -> list[float]:
        """The runs in milliseconds: their spread shows how busy the machine was."""
        return [seconds * 1e3 for seconds in self.seconds]

    @property
    def median(self) -> float:
        """Median of the runs, in seconds."""
        return statistics.median(self.seconds)


def measure(
    contenders: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int, baseline: str | None = None
) -> dict[str, Timing]:
    """Time the contenders by turns.

    Args:
        contenders: what to run, by name.
        device: waited for before and after each run.
        repeats: turns of each; fewer where they do not fit into the budget.
        baseline: the contender that may be slow. If it is, it runs once, after half the turns of the others. The others
            run once before anything counts, as does a baseline that is not slow.
    """
    timings = {name: Timing() for name in contenders}

    def run(name: str) -> float:
        timings[name].result = None  # the memory of the last result is free for this one
        synchronise(device)
        start = time.perf_counter()
        timings[name].result = contenders[name]()
        synchronise(device)
        return time.perf_counter() - start

    def take_turns(names: list[str], turns: int) -> None:
        for _ in range(turns):
            for name in names:
                timings[name].seconds.append(run(name))

    others = [name for name in contenders if name != baseline]
    others_s = sum(run(name) for name in others)
    turns = turns_within_budget(others_s, repeats)
    if baseline is None:
        take_turns(others, turns)
        return timings
    take_turns(others, (turns + 1) // 2)
    baseline_s = run(baseline)
    if baseline_s > SLOW_S:
        timings[baseline].seconds.append(baseline_s)
        take_turns(others, turns - (turns + 1) // 2)
        return timings
    for timing in timings.values():
        timing.seconds.clear()  # only turns that the baseline took part in count
    take_turns([*others, baseline], turns_within_budget(others_s + baseline_s, repeats))
    return timings


def turns_within_budget(seconds_a_turn: float, repeats: int) -> int:
    """How many turns that take so long each fit into the budget: 3 to `repeats`, or 1 if it alone does not fit."""
    least = 3 if seconds_a_turn < BUDGET_S else 1
    return min(repeats, max(least, int(BUDGET_S / max(seconds_a_turn, 1e-9))))


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def touch_memory(wanted_bytes: int) -> None:
    """Write to so much memory once, or to half of what is free: a virtual machine's memory is several times slower the
    first time, when its host has yet to provide it, and whoever came first would pay for all.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    torch.ones(min(wanted_bytes, free // 2), dtype=torch.uint8)
