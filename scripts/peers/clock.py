"""Seconds of a training loop that is run by somebody else's code, told apart from what happens between.

It must not know more than Python: StarDist's environment has nothing of this package's.
"""

import time
from collections.abc import Callable


class TrainingClock:
    """Counts steps and the seconds that they take; start-up and pauses do not count.

    The first step brings the start-up with it: the clock begins at its end.

    Args:
        seconds: after which the training is over.
        now: seconds that only grow; for tests.

    Attributes:
        steps: taken so far.
        elapsed: seconds that count so far.
    """

    def __init__(self, seconds: float, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = seconds
        self.steps = 0
        self.elapsed = 0.0
        self._now = now
        self._since: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether the time is used up, one step at least being taken."""
        return self.steps > 0 and self.elapsed >= self.seconds

    @property
    def step_s(self) -> float | None:
        """Seconds of a step, None before the second."""
        return self.elapsed / (self.steps - 1) if self.steps > 1 else None

    def step(self) -> None:
        """A step is done."""
        now = self._now()
        if self._since is not None:
            self.elapsed += now - self._since
        self.steps += 1
        self._since = now

    def pause(self) -> None:
        """Something begins that is no training, after a step."""
        self._since = None

    def go_on(self) -> None:
        """The next step begins."""
        if self.steps:
            self._since = self._now()
