"""Charts of a report, as SVG that stands in a page by itself.

It must not know files or models.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.2, 2.8
INK, SECOND, THIRD = "#1f5fa8", "#c1440e", "#3a7d44"
Array = np.ndarray


def as_svg(figure: Figure) -> str:
    """The figure as an SVG element; the same figure gives the same text."""
    with matplotlib.rc_context({"svg.hashsalt": "seg3d", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    written = text.getvalue()
    return written[written.index("<svg") :]


def lines(
    curves: Mapping[str, tuple[Sequence[float] | Array, Sequence[float] | Array]],
    *,
    x: str,
    y: str,
    marks: bool = False,
) -> str:
    """A chart of named lines.

    Args:
        curves: by name, values along x and along y.
        x, y: what the axes are called.
        marks: whether each value is marked.
    """
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="tight")
    axes = figure.add_subplot()
    for (name, (across, up)), colour in zip(curves.items(), _colours(len(curves)), strict=True):
        axes.plot(across, up, color=colour, linewidth=1.4, marker="o" if marks else None, markersize=3, label=name)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(fontsize=8)
    return as_svg(figure)


def histogram(values: Mapping[str, Array], *, x: str, is_log: bool = False) -> str:
    """A chart of how often values occur.

    Args:
        values: by name; empty ones are left out.
        x: what the values are called.
        is_log: whether the axis is logarithmic; values must then be positive.
    """
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="tight")
    axes = figure.add_subplot()
    filled = {name: np.asarray(v, float) for name, v in values.items() if len(v)}
    if filled:
        everything = np.concatenate(list(filled.values()))
        low, high = float(everything.min()), float(everything.max())
        high = high if high > low else low + 1
        edges = np.geomspace(low, high, 31) if is_log else np.linspace(low, high, 31)
        for (name, own), colour in zip(filled.items(), _colours(len(filled)), strict=True):
            axes.hist(
                own, bins=edges.tolist(), histtype="step", color=colour, linewidth=1.4, label=f"{name} ({len(own)})"
            )
        if is_log:
            axes.set_xscale("log")
        axes.legend(fontsize=8)
    axes.set_xlabel(x)
    axes.set_ylabel("objects")
    axes.grid(alpha=0.3)
    return as_svg(figure)


def losses(table: pd.DataFrame) -> str:
    """The losses of a training's log against minutes, smoothed over a hundredth of it, on a logarithmic axis."""
    minutes = table["elapsed_seconds"] / 60
    names = [name for name in table.columns if name not in ("epoch", "iteration", "elapsed_seconds", "lr")]
    window = max(1, len(table) // 100)
    figure = Figure(figsize=(2 * WIDTH, HEIGHT), layout="tight")
    axes = figure.add_subplot()
    for name, colour in zip(names, _colours(len(names)), strict=True):
        smooth = table[name].rolling(window, min_periods=1).mean()
        axes.plot(minutes, smooth, color=colour, linewidth=2.0 if name == "loss" else 1.0, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("minutes")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    return as_svg(figure)


def _colours(number: int) -> list[str]:
    if number <= 3:
        return [INK, SECOND, THIRD][:number]
    return [matplotlib.colors.to_hex(colour) for colour in matplotlib.colormaps["tab20"](np.arange(number) % 20)]
