"""Parameters that are numbers in a scene and ranges in a recipe, with the limits that both keep to.

A group of parameters is a frozen dataclass of numbers, each field made by `number`. A recipe gives some of them as
numbers, others as ranges, of which every scene draws one.

It must not know what the parameters mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from math import isfinite, log
from typing import Any, Self

import numpy as np

Given = float | tuple[float, float]
"""A number, or the smallest and the largest."""


def number(
    default: float, *, low: float = 0.0, high: float = float("inf"), is_scale: bool = False, is_late: bool = False
) -> Any:
    """A field of a group.

    Args:
        default: its value.
        low: least value.
        high: largest value.
        is_scale: whether ranges are drawn from by ratio, as of lengths and light: 1 to 4 gives 1 to 2 in half of the
            scenes. Least values of 0 are then excluded.
        is_late: whether it is drawn from a stream of its own, as numbers are that came when recipes were in use: scenes
            of a seed stay as they were.
    """
    return field(default=default, metadata={"low": low, "high": high, "is_scale": is_scale, "is_late": is_late})


@dataclass(frozen=True, kw_only=True)
class Group:
    """Numbers that belong together.

    Raises:
        ValueError: a number is outside its limits; the message names it.
    """

    def __post_init__(self) -> None:
        for known in fields(self):
            _check(known, getattr(self, known.name))

    @classmethod
    def ranges(cls, given: Mapping[str, Any], place: str) -> dict[str, Given]:
        """Check numbers and ranges that a recipe gives.

        Args:
            given: by name, a number or two of them.
            place: what the group is called in messages.

        Returns:
            All parameters of the group, the others at their defaults.

        Raises:
            ValueError: an unknown name, a range that is upside down, or a number outside its limits.
        """
        known = {each.name: each for each in fields(cls)}
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"{place} has no {', '.join(unknown)}; choose among {', '.join(known)}")
        found: dict[str, Given] = {name: getattr(cls, name) for name in known}
        for name, value in given.items():
            found[name] = _number_or_range(value, f"{place}.{name}")
            for end in np.atleast_1d(found[name]).tolist():
                _check(known[name], end, f"{place}.{name}")
        return found

    @classmethod
    def drawn(cls, ranges: Mapping[str, Given], rng: np.random.Generator, late: np.random.Generator) -> Self:
        """Draw a number from every range, in the order of the fields; of late ones from `late`."""
        found = {}
        for known in fields(cls):
            value = ranges[known.name]
            # Also for numbers, so that a narrower range leaves the other draws as they are.
            share = (late if known.metadata["is_late"] else rng).random()
            found[known.name] = _between(value, share, known.metadata["is_scale"]) if _is_range(value) else value
        return cls(**found)


def _is_range(value: Given) -> bool:
    return isinstance(value, tuple)


def _number_or_range(value: Any, name: str) -> Given:
    is_range = isinstance(value, list | tuple)
    ends = value if is_range else [value]
    if len(ends) != 1 + is_range or any(isinstance(end, bool) or not isinstance(end, int | float) for end in ends):
        raise ValueError(f"{name} is {value!r}; give a number, or [smallest, largest]")
    if is_range and ends[0] > ends[1]:
        raise ValueError(f"{name} is {value!r}, which is upside down; give [smallest, largest]")
    return (float(ends[0]), float(ends[1])) if is_range else float(value)


def _check(known: Field[Any], value: float, name: str | None = None) -> None:
    low, high, is_scale = (known.metadata[key] for key in ("low", "high", "is_scale"))
    if not (isfinite(value) and low <= value <= high) or (is_scale and value <= 0):
        least = f"above {low:g}" if is_scale and low == 0 else f"at least {low:g}"
        most = f" and at most {high:g}" if isfinite(high) else ""
        raise ValueError(f"{name or known.name} is {value:g}; it must be {least}{most}")


def _between(value: Any, share: float, is_scale: bool) -> float:
    low, high = value
    return low * float(np.exp(share * log(high / low))) if is_scale else low + share * (high - low)
