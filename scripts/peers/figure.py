"""The race as a picture: scores against minutes, ours as a curve where its states were judged, others at their end."""

from collections.abc import Sequence
from pathlib import Path

from peers.race import Row
from peers.report import HEADINGS

SHOWN = ("f1_50", "f1_70", "seg", "mucov")
COLOURS = {"ours": "#c1440e", "unet": "#2b6ca3", "stardist": "#3a7d44", "otsu": "#777777"}
Curve = tuple[str, str, Sequence[Row]]
"""A name, a colour, and what was judged, the end last."""


def draw(rows: Sequence[Row], file: Path) -> None:
    """Write the picture.

    Args:
        rows: results of contestants, of one race or several; those that failed are left out.
        file: SVG, PNG or PDF.
    """
    curves = [
        (row["contestant"], COLOURS[row["contestant"]], [*row.get("curve", ()), row])
        for row in rows
        if "error" not in row
    ]
    draw_curves(curves, file, along="minutes", label="minutes of training")


def draw_curves(curves: Sequence[Curve], file: Path, *, along: str, label: str) -> None:
    """Write a chart of each score; what has no place along x is a line across.

    Args:
        curves: in the order in which they are drawn; those of one name share an entry of the legend.
        file: SVG, PNG or PDF.
        along: key of the states that is drawn along x.
        label: what it is called.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "seg3d_monai"  # the same rows give the same file
    figure, axes = pyplot.subplots(1, len(SHOWN), figsize=(3.2 * len(SHOWN), 3.0), sharex=True)
    for axis, score in zip(axes, SHOWN, strict=True):
        named: set[str] = set()
        for name, colour, states in curves:
            shown = None if name in named else name
            named.add(name)
            if states[-1][along] is None:
                axis.axhline(states[-1][score], color=colour, linestyle=":", label=shown)
                continue
            places, values = [state[along] for state in states], [state[score] for state in states]
            axis.plot(places, values, color=colour, marker="o", markersize=3, linewidth=1, label=shown)
        axis.set_title(HEADINGS[score], fontsize=10)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)
