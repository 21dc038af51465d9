"""The bars of whole-stack inference: data, and no bar makes the benchmark fail."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, Any]

SEAM_BARS = {1.0: 0.005, 2.0: 0.02}
"""Displacement of the seeds, voxels -> share of wrong cells at seams beyond that away from seams, which it stays below;
without displacement no cell may be wrong anywhere."""
WHOLE_BAR = 1.10
"""Most that a whole stack may take, in times of reading its blocks and running the network on them."""
MEMORY_BAR = 1.05
"""Most that the peak memory of the large stack may be, in times of the small one's."""
WORKERS_BAR = 1.75
"""How many times faster two workers of one thread are than one, at least."""
RECORDS_SECONDS_BAR, RECORDS_GB_BAR = 300, 2.0
"""Most that ten million instances may take."""


def verdicts(result: Mapping[str, Sequence[Row]]) -> Iterator[Row]:
    """What was measured against its bar: {"work", "quantity", "value", "bar", "met"}, met None without a value."""
    for row in result["seams"]:
        work = f"cells of {row['diameter']:g} voxels, displaced by {row['sigma']:g}"
        if row["sigma"] == 0:
            wrong = row["seam"]["wrong"] + row["away"]["wrong"]
            yield _verdict(work, "wrong cells", wrong, "0", wrong == 0)
        else:
            limit = SEAM_BARS[row["sigma"]]
            yield _verdict(work, "excess at seams, %", 100 * row["excess"], f"< {limit:.1%}", row["excess"] < limit)
    for row in result["exact"]:
        work = f"{row['cells']}, halo {'x'.join(map(str, row['halo']))}"
        yield _verdict(work, "errors", row["errors"], "0", row["errors"] == 0)
    for row in result["whole"]:
        value = row["times_bare"]
        yield _verdict(row["model"], "whole stack / bare", value, f"<= {WHOLE_BAR:.2f}x", value <= WHOLE_BAR)
    for row in result["memory"]:
        value = row["ratio"]
        met = None if value is None else value <= MEMORY_BAR
        yield _verdict("peak memory", f"{row['large']} / {row['small']}", value, f"<= {MEMORY_BAR:.2f}x", met)
    for row in result["workers"]:
        value = row["speed_up"]
        yield _verdict("2 workers", "1 worker / 2 workers", value, f">= {WORKERS_BAR:.2f}x", value >= WORKERS_BAR)
    for row in result["records"]:
        work, seconds, peak = f"{row['num_instances']:,} instances", row["seconds"], row["peak_gb"]
        yield _verdict(work, "seconds", seconds, f"< {RECORDS_SECONDS_BAR}", seconds < RECORDS_SECONDS_BAR)
        yield _verdict(work, "peak GB", peak, f"< {RECORDS_GB_BAR:g}", None if peak is None else peak < RECORDS_GB_BAR)
    for row in result["kills"]:
        wrong = row["num_different"] + row["num_repeated"]
        yield _verdict(f"{row['num_kills']} kills, {row['num_workers']} workers", "wrong", wrong, "0", wrong == 0)


def _verdict(work: str, quantity: str, value: float | None, bar: str, met: bool | None) -> Row:
    return {"work": work, "quantity": quantity, "value": value, "bar": bar, "met": met}
