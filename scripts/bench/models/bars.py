"""The bars of the models: data, and no bar makes the benchmark fail."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, Any]

STEP_BARS = {"maskrcnn3d": 1.35, "maskdino3d": 1.6, "mask2former3d": 1.6}
"""Most that a training step may take, in times of its convolutions, linear layers and attention alone."""
REST_BAR = 0.2
"""Largest share of a step that assignment, losses and optimizer may take."""
WAITING_BAR = 0.03
"""Largest share of a training that may wait for batches, with the number of workers that is fastest."""
MEMORY_BAR_GB = 16.0
"""Peak memory of a training step at the papers' sizes stays below this; 1 GB is 1e9 bytes."""


def verdicts(result: Mapping[str, Sequence[Row]]) -> Iterator[Row]:
    """What was measured against its bar: {"model", "quantity", "value", "bar", "met"}, met None without a value."""
    for row in result["steps"]:
        value, limit = row["times_floor"], STEP_BARS[row["model"]]
        yield _verdict(row["model"], "training step / floor", value, f"<= {limit:g}x", value <= limit)
        parts = row["parts_ms"]
        share = (parts["criterion"] + parts["clip, optimizer, EMA"]) / parts["whole"]
        yield _verdict(row["model"], "criterion, optimizer", share, f"<= {REST_BAR:g}", share <= REST_BAR)
    for model in dict.fromkeys(row["model"] for row in result["loop"]):
        rows = [row for row in result["loop"] if row["model"] == model]
        share = max(rows, key=lambda row: row["crops_per_s"])["waiting_share"]
        yield _verdict(model, "waiting for batches", share, f"< {WAITING_BAR:g}", share < WAITING_BAR)
    for row in result["memory"]:
        value = row["peak_gb"]
        met = None if value is None else value < MEMORY_BAR_GB
        if "error" in row:
            met = False
        yield _verdict(row["model"], "peak memory, GB", value, f"< {MEMORY_BAR_GB:g} GB", met)


def _verdict(model: str, quantity: str, value: float | None, bar: str, met: bool | None) -> Row:
    return {"model": model, "quantity": quantity, "value": value, "bar": bar, "met": met}
