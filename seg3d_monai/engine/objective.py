"""What a search makes as large as it can: a metric of `VolumeEvaluator`, or a sum of several.

A sum is read as text, term by term, and never evaluated as Python. Must not know volumes.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from seg3d_monai.engine.evaluator import named_metrics
from seg3d_monai.metrics import InstanceMetrics

__all__ = ["Objective"]


class Objective:
    """A sum of metrics; more is better.

    Args:
        text: a name such as "f1_50", or several with `+` between them; a name that occurs twice counts twice.

    Attributes:
        names: of the metrics, as they are written.

    Raises:
        ValueError: there is no metric of a name; names the nearest.
    """

    def __init__(self, text: str) -> None:
        known = named_metrics(InstanceMetrics().compute())
        self.names = tuple(term.strip() for term in str(text).split("+"))
        for name in self.names:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                mend = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}, or a sum of these"
                raise ValueError(f"metric={text!r} holds {name!r}, which is no metric; {mend}")

    def __str__(self) -> str:
        return " + ".join(self.names)

    def of(self, report: Mapping[str, Any]) -> float:
        """The objective of what `InstanceMetrics.compute` returned."""
        metrics = named_metrics(report)
        return sum(metrics[name] for name in self.names)
