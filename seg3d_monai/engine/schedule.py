"""Learning-rate schedules as functions of the training's progress in [0, 1].

Progress, not a step number, is the argument, so one schedule serves a fixed number of steps and a fixed time. Cosine
decay: Loshchilov and Hutter, SGDR, 2017. A schedule knows neither optimizer nor engine.
"""

from __future__ import annotations

import math

__all__ = ["WarmupCosine"]


class WarmupCosine:
    """Linear warm-up, then half a cosine down to a last factor.

    Args:
        warmup: share of the training that warms up, in [0, 1).
        final: factor at the end, in [0, 1].

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(self, *, warmup: float = 0.02, final: float = 0.01) -> None:
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup={warmup} is not in [0, 1); give the share of the training that warms up")
        if not 0 <= final <= 1:
            raise ValueError(f"final={final} is not in [0, 1]; give a factor of the learning rate")
        self.warmup = warmup
        self.final = final

    def __call__(self, progress: float) -> float:
        """The factor of the learning rate at a progress in [0, 1]; larger progress counts as 1."""
        progress = min(progress, 1.0)
        if progress < self.warmup:
            return progress / self.warmup
        decayed = (progress - self.warmup) / (1 - self.warmup)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * decayed)) / 2
