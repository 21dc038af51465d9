"""The comparison for people: one table of states, and a picture of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import report
from peers.figure import draw_curves
from peers.race import SCORES, Row
from peers.report import HEADINGS

COLOURS = {"scratch": "#777777", "masked": "#2b6ca3", "synthetic": "#c1440e", "both": "#3a7d44"}


def text(result: dict[str, Any]) -> str:
    """The whole report."""
    # The operators' report without any of its sections is the head that all have.
    head = report.text({**result, **{section: [] for section in report.SECTIONS}})
    data = result["data"]
    line = (
        f"{data['name']}: labels of {', '.join(data['labelled'])}; {data['num_unlabelled']} volumes without labels; "
        f"judged on {data['num_val']}"
    )
    lines = [
        [row["start"], f"seed {row['seed']}", f"{state['steps']:,}", *(f"{state[name]:.3f}" for name in SCORES), ""]
        for row in result["starts"]
        for state in states(row)
    ]
    heads = [HEADINGS.get(name, name) for name in SCORES]
    return "\n".join([head, "", line, "", report.table(lines, ["start", "", "steps", *heads, ""])])


def states(row: Row) -> list[Row]:
    """What was judged of a training, its end last."""
    return [*(state for state in row.get("curve", ()) if state["steps"] != row["steps"]), row]


def draw(rows: Sequence[Row], file: Path) -> None:
    """Write the picture: scores against steps."""
    curves = [(row["start"], COLOURS[row["start"]], states(row)) for row in rows]
    draw_curves(curves, file, along="steps", label="steps on labels")
