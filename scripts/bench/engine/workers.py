"""How much faster two workers of one thread are than one, a sample: the bundle as it ships, steady state."""

import statistics

from bench.engine.bars import Row
from bench.engine.bundle import LONG_MINUTES, Options, read_bundle
from bench.engine.processes import in_processes
from bench.engine.turns import engine_run

TURNS = (1, 2, 2, 1)
NUM_WARMUP, NUM_CROPS = 5, 96
METHOD = (
    f"Workers: the engine's run with 1 and with 2 processes of one thread, by turns {' '.join(map(str, TURNS))}, each "
    f"time in fresh processes that meet over gloo, as Ray's workers do; Ray itself is idle during steps. The same "
    f"{NUM_CROPS} crops after {NUM_WARMUP} steps. Time a sample is the median of step times over the crops of a step."
)


def measure(options: Options) -> list[Row]:
    """One row: milliseconds a sample of each turn, and how many times faster two workers are."""
    taken: dict[int, list[float]] = {1: [], 2: []}
    means: dict[int, list[float]] = {1: [], 2: []}
    turns = (1, 2) if options.is_quick else TURNS
    for turn, workers in enumerate(turns):
        seconds, batch_size = in_processes(workers, 1, options.folder, measure_here, options, turn, workers)[0]
        taken[workers].append(statistics.median(seconds) / (batch_size * workers) * 1e3)
        means[workers].append(statistics.mean(seconds) / (batch_size * workers) * 1e3)
    row: Row = {"turns": turns, "batch_size": batch_size, "one_ms": taken[1], "two_ms": taken[2]}
    row |= {"speed_up_of_means": sum(means[1]) / sum(means[2])}
    return [row | {"speed_up": sum(taken[1]) / sum(taken[2])}]


def measure_here(options: Options, turn: int, workers: int) -> tuple[list[float], int]:
    """Seconds of this process's steps, and its crops a step."""
    warmup, crops = (1, 8) if options.is_quick else (NUM_WARMUP, NUM_CROPS)
    parser = read_bundle(options, f"workers_{turn}", changes={"max_minutes": LONG_MINUTES})
    run = engine_run(parser)
    batch_size = int(parser["batch_size"])
    run.take(warmup)
    run.take(crops // (batch_size * workers))
    return run.seconds[warmup:], batch_size
