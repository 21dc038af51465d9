"""The bars of the data layer: data, and no bar makes the benchmark fail."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, Any]

BUILD_BAR = 0.3
"""Rate of building an index, in times of only reading its label volumes, at least."""
PROCESSES_BAR = 1.7
"""How many times faster two processes build than one, at least."""
OPEN_MS_BAR, RECORD_MS_BAR, COUNT_S_BAR = 50.0, 0.3, 1.0
"""Most that opening an index of ten million crops, reading the record of one crop, and a filtered count may take."""
SAMPLER_S_BAR, SAMPLER_MB_BAR = 1.0, 250.0
"""Most that a sampler of ten million crops may take to start, in seconds and in memory."""
READ_BAR, WHOLE_BAR = 0.9, 20.0
"""Rate of reading crops, in times of the bare library's on the same regions and of reading the whole file, at least."""
SAMPLES_BAR = 5.0
"""Training samples a second, in times of the same over a mask an instance, at least."""
LOADER_MB_BAR = 500.0
"""Most that a loader's worker may hold."""
PLAN_S_BAR, PLANNED_BAR = 60.0, 1.0
"""Most seconds of a plan for all bundles; F1 of a training with it, in times of one with settings by hand, at least."""


def verdicts(result: Mapping[str, Sequence[Row]]) -> Iterator[Row]:
    """What was measured against its bar: {"work", "quantity", "value", "bar", "met"}, met None without a value."""
    for row in result["build"]:
        work = f"{row['voxels'] / 1e9:.2g} Gvoxel of labels"
        yield _at_least(work, "build / only read", row["build_over_read"], BUILD_BAR)
        yield _at_least(work, "2 processes / 1", row["speed_up"], PROCESSES_BAR)
    for row in result["crops"]:
        work = f"{row['num_crops']:,} crops"
        yield _below(work, "open, ms", row["open_ms"], OPEN_MS_BAR)
        yield _below(work, "a crop's record, ms", row["record_ms"], RECORD_MS_BAR)
        yield _below(work, "filtered count, s", row["count_s"], COUNT_S_BAR)
        yield _below(work, "sampler's start, s", row["sampler_s"], SAMPLER_S_BAR)
        yield _below(work, "sampler's peak, MB", row["sampler_peak_mb"], SAMPLER_MB_BAR)
    for row in result["reads"]:
        work = f"crops of {row['gigabytes']:.2f} GB, {row['format']}"
        yield _at_least(work, "ours / bare library", row["bare_over_ours"], READ_BAR)
        yield _at_least(work, "ours / whole file", row["whole_over_ours"], WHOLE_BAR)
    for row in result["samples"]:
        yield _at_least(f"samples, {row['augmentation']}", "ours / dense masks", row["ratio"], SAMPLES_BAR)
    for row in result["loader_memory"]:
        work = f"worker by {row['start']}, {row['gigabytes']:.1f} GB volume"
        yield _below(work, "peak, MB", row["peak_mb"], LOADER_MB_BAR)
    for row in result["plan"]:
        yield _below(f"plan, {row['data']}", "seconds", row["plan_s"], PLAN_S_BAR)
        if row["minutes"]:
            work = f"plan, {row['minutes']:g} minutes"
            yield _at_least(work, "F1 / by hand", row["planned_over_hand"], PLANNED_BAR)


def _at_least(work: str, quantity: str, value: float | None, bar: float) -> Row:
    met = None if value is None else value >= bar
    return {"work": work, "quantity": quantity, "value": value, "bar": f">= {bar:g}x", "met": met}


def _below(work: str, quantity: str, value: float | None, bar: float) -> Row:
    met = None if value is None else value < bar
    return {"work": work, "quantity": quantity, "value": value, "bar": f"< {bar:g}", "met": met}
