"""The report for people: where the race was run and how, and its one table."""

from collections.abc import Sequence
from typing import Any

from bench import report
from peers.race import SCORES, Row

HEADINGS = {"f1_50": "F1@0.5", "f1_70": "F1@0.7", "seg": "SEG", "mucov": "MUCov", "map": "mAP"}


def text(result: dict[str, Any]) -> str:
    """The whole report."""
    # The operators' report without any of its sections is the head that all have.
    head = report.text({**result, **{section: [] for section in report.SECTIONS}})
    parts = [head, "", data_line(result["data"]), "", race_table(result["contestants"])]
    parts += [part for row in result["contestants"] if row.get("curve") for part in ("", curve_table(row))]
    if result["summary"]:
        parts += ["", summary_table(result["summary"])]
    lines = [f"{row['contestant']}: {listed(row['versions'])}" for row in result["contestants"] if row.get("versions")]
    return "\n".join([*parts, *dict.fromkeys(["", *lines] if lines else [])])


def data_line(data: dict[str, Any]) -> str:
    """What was trained, tuned and judged on."""
    return f"{data['name']}: " + "; ".join(
        f"{part} {data[part]['num_volumes']} volumes of {', '.join(data[part]['specimens'])}"
        for part in ("train", "tune", "val")
    )


def race_table(rows: Sequence[Row]) -> str:
    """A line for each contestant and seed."""
    lines = []
    for row in rows:
        start = [row["contestant"], "" if row["seed"] is None else f"seed {row['seed']}"]
        start += [
            report.number(row["minutes"], "g"),
            report.number(row.get("steps"), ","),
            _number(row, "step_s", ".2f"),
        ]
        if "error" in row:
            lines.append([*start, *[""] * (len(SCORES) + 2), "failed"])
            continue
        scores = [f"{row[name]:.3f}" for name in SCORES]
        counts = f"{row['tp']} / {row['fp']} / {row['fn']}"
        lines.append([*start, *scores, counts, f"{row['mvoxel_per_s']:.2f}", ""])
    head = ["contestant", "", "minutes", "steps", "s / step", *_score_heads(), "TP / FP / FN", "Mvoxel/s", ""]
    return report.table(lines, head)


def curve_table(row: Row) -> str:
    """A line for each state of a training that was judged, with the thresholds of its end."""
    lines = [
        [f"{state['minutes']:.1f}", f"{state['steps']:,}", *(f"{state[name]:.3f}" for name in SCORES), ""]
        for state in row["curve"]
    ]
    return report.table(lines, [f"{row['contestant']}, seed {row['seed']}: minutes", "steps", *_score_heads(), ""])


def summary_table(rows: Sequence[Row]) -> str:
    """Mean and standard deviation over seeds."""
    lines = [
        [row["contestant"], f"{row['num_seeds']} seeds"]
        + [f"{row[name]['mean']:.3f} ± {row[name]['sd']:.3f}" for name in SCORES]
        + [""]
        for row in rows
    ]
    return report.table(lines, ["mean ± sd", "", *_score_heads(), ""])


def listed(numbers: dict[str, Any]) -> str:
    """Names and values in one line."""
    return ", ".join(f"{key} {value}" for key, value in numbers.items())


def _score_heads() -> list[str]:
    return [HEADINGS.get(name, name) for name in SCORES]


def _number(row: Row, name: str, pattern: str) -> str:
    return report.number(row.get(name), pattern)
