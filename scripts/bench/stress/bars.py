"""The bars of crowded and anisotropic volumes: data, and no bar makes the benchmark fail."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, Any]

F1_BAR = 0.9
"""Least F1 at IoU 0.5 of each test volume, whole and in blocks."""
CAPS = ("max_detections", "post_nms_top_n", "num_queries")
"""What limits the objects of an image; no training and no prediction may warn that one of them is too low."""


def caps_in(said: str) -> list[str]:
    """The limits that a log says to raise, in the order of `CAPS`."""
    found = set(re.findall(rf"\braise ({'|'.join(CAPS)})\b", said))
    return [name for name in CAPS if name in found]


def verdicts(result: Mapping[str, Sequence[Row]]) -> Iterator[Row]:
    """What was measured against its bar: {"work", "quantity", "value", "bar", "met"}; rows with an error are missed."""
    for row in result["training"]:
        work = f"{row['ratio']:g}:1 training"
        if "error" in row:
            yield {"work": work, "quantity": "end", "value": None, "bar": "reached", "met": False}
        else:
            yield _cap_verdict(work, row["caps"])
    for row in result["volumes"]:
        work = f"{row['ratio']:g}:1 {row['volume']} {row['way']}"
        met = row["f1_50"] >= F1_BAR
        yield {"work": work, "quantity": "F1@0.5", "value": row["f1_50"], "bar": f">= {F1_BAR:g}", "met": met}
        yield _cap_verdict(work, row["caps"])


def _cap_verdict(work: str, caps: Sequence[str]) -> Row:
    return {"work": work, "quantity": "cap warnings", "value": len(caps), "bar": "0", "met": not caps}
