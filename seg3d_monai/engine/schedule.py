"""Learning-rate schedules as functions of the training's progress in [0, 1].

Progress, not a step number, is the argument, so one schedule serves a fixed number of steps and a fixed time. Cosine
decay: Loshchilov and Hutter, SGDR, 2017. Warm-up, stable, decay: Hu et al., MiniCPM, 2024; the shapes of its decay:
Hägele et al., Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations, 2024. A schedule knows neither
optimizer nor engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

__all__ = ["WarmupCosine", "WarmupStableDecay"]

DECAYS: Mapping[str, Callable[[float], float]] = {"sqrt": lambda done: 1 - math.sqrt(done), "linear": lambda d: 1 - d}
"""From the share of the decay that is done, in [0, 1], to what is left of the way down, from 1 to 0."""


class WarmupCosine:
    """Linear warm-up, then half a cosine down to a last factor.

    Args:
        warmup: share of the training that warms up, in [0, 1).
        final: factor at the end, in [0, 1].

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(self, *, warmup: float = 0.02, final: float = 0.01) -> None:
        _check(warmup, final)
        self.warmup = warmup
        self.final = final

    def __call__(self, progress: float) -> float:
        """The factor of the learning rate at a progress in [0, 1]; larger progress counts as 1."""
        progress = min(progress, 1.0)
        if progress < self.warmup:
            return progress / self.warmup
        decayed = (progress - self.warmup) / (1 - self.warmup)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * decayed)) / 2


class WarmupStableDecay:
    """Linear warm-up, the full learning rate for most of the training, then a short decay to a last factor.

    A checkpoint of the stable part does not know how long the training was meant to be: a run can go on from it for
    longer than was planned, and only the decay is done anew.

    Args:
        warmup: share of the training that warms up, in [0, 1).
        decay: share of the training, its last, that decays, in (0, 1 - warmup].
        final: factor at the end, in [0, 1].
        shape: "sqrt", 1 - sqrt(share of the decay that is done), which ended best in Hägele et al., or "linear".

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(self, *, warmup: float = 0.02, decay: float = 0.2, final: float = 0.0, shape: str = "sqrt") -> None:
        _check(warmup, final)
        if not 0 < decay <= 1 - warmup:
            raise ValueError(f"decay={decay} is not in (0, {1 - warmup:g}]; give the share of the training that decays")
        if shape not in DECAYS:
            raise ValueError(f"shape={shape!r} is not known; choose one of {', '.join(DECAYS)}")
        self.warmup = warmup
        self.decay = decay
        self.final = final
        self.shape = shape

    def __call__(self, progress: float) -> float:
        """The factor of the learning rate at a progress in [0, 1]; larger progress counts as 1."""
        progress = min(progress, 1.0)
        if progress < self.warmup:
            return progress / self.warmup
        done = max(0.0, 1 - (1 - progress) / self.decay)
        return self.final + (1 - self.final) * DECAYS[self.shape](done)


def _check(warmup: float, final: float) -> None:
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup={warmup} is not in [0, 1); give the share of the training that warms up")
    if not 0 <= final <= 1:
        raise ValueError(f"final={final} is not in [0, 1]; give a factor of the learning rate")
