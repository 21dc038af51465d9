"""What a search for settings has found, as a text for people. Must not know how it was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from seg3d_monai.engine.evaluator import named_metrics
from seg3d_monai.engine.objective import Objective
from seg3d_monai.engine.tune_search import SCORE, Curve, Settings

__all__ = ["FEW_OBJECTS", "Tuned", "tuned_text"]

FEW_OBJECTS = 50
"""Fewer true objects than these say little about other volumes."""
METRICS = ("f1_50", "precision_50", "recall_50", "f1_70", "seg", "map")
ROWS = tuple(place / 20 for place in range(1, 20))
"""Score thresholds of the curve that are shown."""


@dataclass(frozen=True)
class Tuned:
    """Settings before and after a search.

    Attributes:
        objective: what was searched for.
        volumes: names of the volumes.
        trained: those of them that the network was trained on.
        num_truth: true objects.
        num_blocks: blocks of all volumes.
        before, after: the settings, by key of the configuration.
        report_before, report_after: of predictions with these settings, as `InstanceMetrics.compute` gives them.
        rejected: what the search found if its prediction was worse than before, so that nothing was changed.
        curve: the objective over the score threshold, the other settings as after.
    """

    objective: Objective
    volumes: Sequence[str]
    trained: Sequence[str]
    num_truth: int
    num_blocks: int
    before: Settings
    after: Settings
    report_before: dict[str, Any]
    report_after: dict[str, Any]
    rejected: Settings | None
    curve: Curve


def tuned_text(tuned: Tuned) -> str:
    """The settings and metrics before and after, the curve, and what to be careful about."""
    names = list(dict.fromkeys([*METRICS, *tuned.objective.names]))
    before, after = named_metrics(tuned.report_before), named_metrics(tuned.report_after)
    best_before, best_after = (tuned.objective.of(report) for report in (tuned.report_before, tuned.report_after))
    rows = [("", "before", "after")]
    rows += [(name, f"{tuned.before[name]:g}", f"{tuned.after[name]:g}") for name in tuned.before]
    rows += [("", "", ""), (str(tuned.objective), f"{best_before:.4f}", f"{best_after:.4f}")]
    if len(tuned.objective.names) == 1:
        names.remove(tuned.objective.names[0])
    rows += [(name, f"{before[name]:.4f}", f"{after[name]:.4f}") for name in names]
    old, new = (report["thresholds"]["0.5"] for report in (tuned.report_before, tuned.report_after))
    counts = (("tp", "found at IoU 0.5"), ("fp", "false"), ("fn", "missed"))
    rows += [(words, str(old[key]), str(new[key])) for key, words in counts]
    parts = [
        f"{tuned.objective} on {len(tuned.volumes)} volumes with {tuned.num_truth} objects: {_listed(tuned.volumes)}",
        "\n".join(f"{name:<40}{first:>12}{second:>12}".rstrip() for name, first, second in rows),
        f"{tuned.objective} over {SCORE}, the other settings as after:",
        "\n".join(_curve_rows(tuned)),
    ]
    return "\n\n".join([*parts, *_notes(tuned)]) + "\n"


def _curve_rows(tuned: Tuned) -> list[str]:
    marks = {tuned.before[SCORE]: "before", tuned.after[SCORE]: "after"}
    if len(marks) == 1:
        marks = {tuned.after[SCORE]: "before and after"}
    rows = []
    for threshold in sorted({*ROWS, *marks}):
        if threshold >= tuned.curve.lower:
            step = tuned.curve.step_at(threshold)
            value, count = tuned.curve.values[step], tuned.curve.num_objects[step]
            rows.append(f"{threshold:>8g}{value:>10.4f}{count:>8} objects  {marks.get(threshold, '')}".rstrip())
    return rows


def _notes(tuned: Tuned) -> list[str]:
    notes = []
    if tuned.num_blocks > len(tuned.volumes):
        notes.append(
            f"note: the volumes have {tuned.num_blocks} blocks. The curve counts an object in the block that owns most "
            "of it; before and after are predictions of whole volumes, stitched."
        )
    if tuned.rejected is not None:
        shown = ", ".join(f"{name} {value:g}" for name, value in tuned.rejected.items())
        notes.append(f"note: {shown} looked better block by block, but not in a prediction; nothing was changed.")
    if tuned.num_truth < FEW_OBJECTS:
        notes.append(
            f"warning: {tuned.num_truth} objects are few: other volumes may want other settings. Take more volumes, or "
            "keep the settings that there were."
        )
    if tuned.trained:
        notes.append(
            f"warning: the network was trained on {_listed(tuned.trained)}, where it finds more than elsewhere and "
            "with higher scores. Take volumes that it does not know."
        )
    return notes


def _listed(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
