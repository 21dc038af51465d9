"""The bars of the engine: data, and no bar makes the benchmark fail."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, Any]

ENGINE_BAR = 1.03
"""Most that a step through the engine may take, in times of a plain loop's."""
ZERO0_BAR = 1.10
"""Most that a step under DeepSpeed's ZeRO 0 may take, in times of a step without."""
WORKERS_BAR = 1.75
"""How many times faster two workers of one thread are than one, a sample, at least."""
GRADIENT_BAR = 1e-4
"""Most that gradients may differ, relative to their norm, for every parameter."""
BYTES_BAR = 0.65
"""Most that a worker may hold under ZeRO 3 with two workers, in times of what it holds under ZeRO 0."""
START_BAR_S = 45.0
"""Seconds until the first iteration of two workers has ended, which it stays below."""


def verdicts(result: Mapping[str, Sequence[Row]]) -> Iterator[Row]:
    """What was measured against its bar: {"work", "quantity", "value", "bar", "met"}."""
    for row in result["engine"]:
        value, apart = row["times_baseline"], row["largest_deviation"]
        yield _verdict("one worker", "engine / plain loop", value, f"<= {ENGINE_BAR:.2f}x", value <= ENGINE_BAR)
        yield _verdict("one worker", "difference of losses", apart, "0", apart == 0)
    for row in result["zero0"]:
        value = row["times_baseline"]
        yield _verdict("one worker", "ZeRO 0 / engine", value, f"<= {ZERO0_BAR:.2f}x", value <= ZERO0_BAR)
    for row in result["workers"]:
        value = row["speed_up"]
        yield _verdict("2 workers", "speed-up a sample", value, f">= {WORKERS_BAR:.2f}x", value >= WORKERS_BAR)
    for row in result["gradients"][1:]:
        for quantity in ("worst", "overall"):
            value = row[quantity]
            yield _verdict(row["way"], f"gradient, {quantity}", value, f"<= {GRADIENT_BAR:.0e}", value <= GRADIENT_BAR)
    for row in result["bytes"][1:]:
        value = row["of_zero0"]
        yield _verdict(f"{row['workers']} workers", "ZeRO 3 / ZeRO 0", value, f"<= {BYTES_BAR}x", value <= BYTES_BAR)
    for row in result["start"]:
        value = row["seconds"]
        work = f"{row['workers']} workers" if row["workers"] > 1 else "1 worker"
        yield _verdict(work, "seconds to first step", value, f"< {START_BAR_S:g} s", value < START_BAR_S)


def _verdict(work: str, quantity: str, value: float, bar: str, met: bool) -> Row:
    return {"work": work, "quantity": quantity, "value": value, "bar": bar, "met": met}
