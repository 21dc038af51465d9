"""Numbers as the plan's texts write them. Must not know what they mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "KB"))


def by(numbers: Iterable[float]) -> str:
    """14 x 18 x 17."""
    return " x ".join(number(n) for n in numbers)


def number(value: float) -> str:
    """Three digits, without an exponent or a dot that says nothing."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def memory_text(num_bytes: float) -> str:
    """1.5 GB."""
    for size, unit in UNITS:
        if num_bytes >= size:
            return f"{number(num_bytes / size)} {unit}"
    return f"{round(num_bytes)} bytes"


def names(words: Sequence[str], most: int = 3) -> str:
    """Some of many names."""
    rest = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + rest


def value(anything: Any) -> str:
    """A value of a configuration on one line."""
    if isinstance(anything, list | tuple):
        return "[" + ", ".join(value(item) for item in anything) + "]"
    if isinstance(anything, float):
        return f"{anything:g}"
    return "null" if anything is None else str(anything)


def two_digits(count: float) -> int:
    """A count rounded to two digits, for a limit that is no more exact than that."""
    if count < 1:
        return 0
    step = 10 ** max(0, math.floor(math.log10(count)) - 1)
    return int(step * round(count / step))
