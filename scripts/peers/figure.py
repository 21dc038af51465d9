"""The race as a picture: scores against minutes, ours as a curve where its states were judged, others at their end."""

from collections.abc import Sequence
from pathlib import Path

from peers.race import Row
from peers.report import HEADINGS

SHOWN = ("f1_50", "f1_70", "seg", "mucov")
COLOURS = {"ours": "#c1440e", "unet": "#2b6ca3", "stardist": "#3a7d44", "otsu": "#777777"}


def draw(rows: Sequence[Row], file: Path) -> None:
    """Write the picture.

    Args:
        rows: results of contestants, of one race or several; those that failed are left out.
        file: SVG, PNG or PDF.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "compare_peers"  # the same rows give the same file
    figure, axes = pyplot.subplots(1, len(SHOWN), figsize=(3.2 * len(SHOWN), 3.0), sharex=True)
    for axis, score in zip(axes, SHOWN, strict=True):
        named: set[str] = set()
        for row in rows:
            if "error" in row:
                continue
            name = row["contestant"]
            label = None if name in named else name
            named.add(name)
            if row["minutes"] is None:
                axis.axhline(row[score], color=COLOURS[name], linestyle=":", label=label)
                continue
            states = [*row.get("curve", ()), row]
            minutes, values = [state["minutes"] for state in states], [state[score] for state in states]
            axis.plot(minutes, values, color=COLOURS[name], marker="o", markersize=3, linewidth=1, label=label)
        axis.set_title(HEADINGS[score], fontsize=10)
        axis.set_xlabel("minutes of training")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)
