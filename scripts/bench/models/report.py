"""The report for people: where it was measured and how, the settings, times and memory, and at last the bars."""

import json
from collections.abc import Sequence
from typing import Any

from bench import report
from bench.models import loop, memory, steps
from bench.models.bars import Row
from bench.models.floor import KINDS

METHOD = f"{steps.METHOD} {loop.METHOD} {memory.METHOD}"


def text(result: dict[str, Any]) -> str:
    """The whole report."""
    # The operators' report without any of its sections is the head that both have.
    parts = [report.text({**result, **{section: [] for section in report.SECTIONS}})]
    if result["steps"]:
        parts += [title("Training steps"), settings(result["steps"]), step_table(result["steps"])]
        parts += ["", parts_table(result["steps"]), "", floor_table(result["steps"])]
    if result["loop"]:
        parts += [title("Training loops"), settings(result["loop"]), loop_table(result["loop"])]
    if result["memory"]:
        parts += [title("Peak memory at the papers' sizes"), settings(result["memory"]), memory_table(result["memory"])]
    return "\n".join([*parts, title("Bars"), bars_table(result["bars"])])


def title(words: str) -> str:
    """A heading with space above it."""
    return f"\n{words}\n{'=' * len(words)}"


def settings(rows: Sequence[Row]) -> str:
    """The settings of each model, one line each."""
    lines = []
    for row in rows:
        lines += [f"{row['model']} {' '.join(row.get('overlays', []))}".rstrip()]
        lines += [f"    {key}: {_short(value)}" for key, value in row.get("settings", {}).items()]
        lines += [f"    changed: {', '.join(row['changed_ids'])}"] if "changed_ids" in row else []
        lines += [f"    instances of the crops: {row['instances_of_crops']}"] if "instances_of_crops" in row else []
    return "\n".join([*lines, ""])


def _short(value: Any) -> str:
    if isinstance(value, dict):
        inside = ", ".join(f"{key}={_short(x)}" for key, x in value.items() if key != "_target_")
        return f"{str(value.get('_target_', '')).split('.')[-1]}({inside})"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else json.dumps(value)


def step_table(rows: Sequence[Row]) -> str:
    """The whole step against its floor."""
    lines = [
        [
            row["model"],
            "",
            f"{row['step_ms']:,.1f}",
            f"{min(row['step_runs_ms']):,.1f} to {max(row['step_runs_ms']):,.1f}",
            f"{row['floor_ms']:,.1f}",
            f"{min(row['floor_runs_ms']):,.1f} to {max(row['floor_runs_ms']):,.1f}",
            f"{row['times_floor']:.3f}x",
            "",
        ]
        for row in rows
    ]
    head = ["model", "", "step ms", "range", "floor ms", "range", "step / floor", ""]
    return report.table(lines, head)


def parts_table(rows: Sequence[Row]) -> str:
    """How the step's time is divided."""
    names = list(rows[0]["parts_ms"])
    lines = [[row["model"], "", *(f"{row['parts_ms'][name]:,.1f}" for name in names), ""] for row in rows]
    head = [{"matching": "of which matching"}.get(name, name) for name in names]
    return report.table(lines, ["parts of a step, ms", "", *head, ""])


def floor_table(rows: Sequence[Row]) -> str:
    """How the floor's time is divided, and over how many calls."""
    lines = [
        [row["model"], "", *(f"{row['floor_kinds_ms'][k]:,.1f} ({row['calls'][k]})" for k in KINDS), ""] for row in rows
    ]
    return report.table(lines, ["parts of the floor, ms (calls)", "", *KINDS, ""])


def loop_table(rows: Sequence[Row]) -> str:
    """Waiting and crops a second."""
    lines = [
        [
            row["model"],
            "",
            str(row["num_workers"]),
            f"{row['step_ms']:,.1f}",
            f"{row['wait_ms']:,.1f}",
            f"{100 * row['waiting_share']:.1f} %",
            f"{row['crops_per_s']:.2f}",
            "",
        ]
        for row in rows
    ]
    return report.table(lines, ["model", "", "workers", "step ms", "wait ms", "waiting", "crops / s", ""])


def memory_table(rows: Sequence[Row]) -> str:
    """Peak memory."""
    lines = [
        [
            row["model"],
            f"checkpointed: {', '.join(row.get('checkpointed', [])) or 'nothing'}",
            str(row.get("num_instances", "")),
            report.number(row["peak_gb"], ".2f"),
            report.number(row.get("rss_after_import_gb"), ".2f"),
            " ".join(f"{seconds:.0f}" for seconds in row.get("steps_s", [])),
            row.get("error", ""),
        ]
        for row in rows
    ]
    return report.table(lines, ["model", "", "instances", "peak GB", "after import GB", "seconds of steps", ""])


def bars_table(rows: Sequence[Row]) -> str:
    """What was measured against its bar."""
    lines = [
        [row["model"], row["quantity"], report.number(row["value"], ".2f"), row["bar"], report.yes_or_no(row["met"])]
        for row in rows
    ]
    return report.table(lines, ["model", "quantity", "measured", "bar", "met?"])
