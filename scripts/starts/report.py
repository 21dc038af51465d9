"""The comparison for people: one table of states, and a picture of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import report
from peers.race import SCORES, Row
from peers.report import HEADINGS

SHOWN = ("f1_50", "f1_70", "seg", "mucov")
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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "compare_starts"  # the same rows give the same file
    figure, axes = pyplot.subplots(1, len(SHOWN), figsize=(3.2 * len(SHOWN), 3.0), sharex=True)
    for axis, score in zip(axes, SHOWN, strict=True):
        named: set[str] = set()
        for row in rows:
            name = row["start"]
            found = states(row)
            axis.plot(
                [state["steps"] for state in found],
                [state[score] for state in found],
                color=COLOURS[name],
                marker="o",
                markersize=3,
                linewidth=1,
                label=None if name in named else name,
            )
            named.add(name)
        axis.set_title(HEADINGS[score], fontsize=10)
        axis.set_xlabel("steps on labels")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)
