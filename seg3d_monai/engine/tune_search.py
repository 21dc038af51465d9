"""The search for settings: one after the other, in a few rounds, each value with the score threshold that suits it.

Two rules keep noise from moving anything. What differs from the best by less than the tolerance is as good as the best,
and of what is equally good the setting that there was is taken, or the one nearest to it. A score threshold is the
middle of the widest stretch of thresholds that are equally good, so that it does not stand beside a step.

Must not know volumes, networks or metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

__all__ = ["SCORE", "Curve", "Judge", "choose_near", "choose_score", "search_settings"]

SCORE = "score_threshold"
ROUNDS = 3
_DIGITS = range(2, 7)
Settings = Mapping[str, float]


@dataclass(frozen=True)
class Curve:
    """The objective over the score threshold, a step function.

    Attributes:
        lower: the least threshold that is looked at; the first step begins there.
        upper: [S] ascending; step i holds for thresholds above `upper[i - 1]` up to `upper[i]`.
        values: [S] the objective.
        num_objects: [S] predicted objects.
    """

    lower: float
    upper: Sequence[float]
    values: Sequence[float]
    num_objects: Sequence[int]

    def step_at(self, threshold: float) -> int:
        """The step of a threshold; the last for those above all."""
        return next((i for i, upper in enumerate(self.upper) if threshold <= upper), len(self.upper) - 1)

    def start_of(self, step: int) -> float:
        """Where a step begins."""
        return self.upper[step - 1] if step else self.lower


class Judge(Protocol):
    """Says how good settings are."""

    def curve(self, settings: Settings) -> Curve:
        """The objective over the score threshold, the other settings as they are."""
        ...


def search_settings(
    judge: Judge,
    start: Settings,
    candidates: Mapping[str, Sequence[float]],
    *,
    tolerance: float,
    rounds: int = ROUNDS,
) -> dict[str, float]:
    """Settings that are about as good as any.

    Args:
        judge: says how good settings are.
        start: the settings that there are, the score threshold among them.
        candidates: values to try, by setting; the others stay.
        tolerance: by how much a value may fall short of the best and still be as good.
        rounds: how often all settings are gone through at most.
    """
    settings = dict(start)
    for _ in range(rounds):
        before = dict(settings)
        for name, tried in candidates.items():
            choices = sorted({*tried, start[name]})
            values = [max(judge.curve(settings | {name: choice}).values) for choice in choices]
            settings[name] = choose_near(choices, values, start[name], tolerance)
        if settings == before:
            break
    settings[SCORE] = choose_score(judge.curve(settings), start[SCORE], tolerance)
    return settings


def choose_near(choices: Sequence[float], values: Sequence[float], start: float, tolerance: float) -> float:
    """Of the choices that are as good as the best, the one nearest to where the search began.

    Args:
        choices: ascending; `start` is one of them.
        values: the objective of each.
        start: the setting that there was.
        tolerance: as for `search_settings`.
    """
    origin, best = choices.index(start), max(values)
    good = [place for place, value in enumerate(values) if value >= best - tolerance]
    return choices[min(good, key=lambda place: (abs(place - origin), -values[place]))]


def choose_score(curve: Curve, start: float, tolerance: float) -> float:
    """The score threshold that there was if it is as good as the best, else the middle of the widest good stretch.

    Args:
        curve: the objective over the threshold.
        start: the threshold that there was.
        tolerance: as for `search_settings`.
    """
    best = max(curve.values)
    good = [value >= best - tolerance for value in curve.values]
    if good[curve.step_at(start)]:
        return start
    edges = [0, *(i for i in range(1, len(good)) if good[i] != good[i - 1]), len(good)]
    stretches = [(curve.start_of(a), curve.upper[b - 1]) for a, b in pairwise(edges) if good[a]]
    low, high = max(stretches, key=lambda stretch: stretch[1] - stretch[0])
    middle = (low + high) / 2
    # As few digits as say it, since a person will read it.
    return next((short for digits in _DIGITS if low < (short := round(middle, digits)) < high), middle)
