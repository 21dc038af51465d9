"""Charts of a report, as SVG that stands in a page by itself.

It must not know files or models.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

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
    is_share: bool = False,
) -> str:
    """A chart of named lines.

    Args:
        curves: by name, values along x, none below 0, and along y.
        x, y: what the axes are called.
        marks: whether each value is marked.
        is_share: whether both axes run from 0 to 1, so that charts of several reports compare.
    """
    figure, axes = _chart()
    for (name, (across, up)), colour in zip(curves.items(), _colours(len(curves)), strict=True):
        axes.plot(across, up, color=colour, linewidth=1.4, marker="o" if marks else None, markersize=3, label=name)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if is_share:
        axes.set_xlim(0.0, 1.0)
        axes.set_ylim(0.0, 1.02)
    else:
        axes.set_xlim(left=0.0)
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
    figure, axes = _chart()
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
            _plain_ticks(axes.xaxis)
        axes.legend(fontsize=8)
    axes.set_xlabel(x)
    axes.set_ylabel("objects")
    axes.grid(alpha=0.3)
    return as_svg(figure)


def losses(table: pd.DataFrame) -> str:
    """The losses of a training's log against minutes, smoothed over a hundredth of it, on a logarithmic axis."""
    minutes = table["elapsed_seconds"] / 60
    beside = ("epoch", "iteration", "elapsed_seconds", "memory_gb", "cuda_memory_gb", "lr")
    names = [name for name in table.columns if name not in beside]
    window = max(1, len(table) // 100)
    figure, axes = _chart(HEIGHT + 0.2 * -(-len(names) // 3))
    for name, colour in zip(names, _colours(len(names)), strict=True):
        smooth = table[name].rolling(window, min_periods=1).mean()
        axes.plot(minutes, smooth, color=colour, linewidth=2.0 if name == "loss" else 1.0, label=name)
    axes.set_yscale("log")
    _plain_ticks(axes.yaxis)
    axes.set_xlabel("minutes")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=7, ncols=3, loc="outside lower center", frameon=False)
    return as_svg(figure)


def _chart(height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _plain_ticks(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis whose data are drawn, not more than fit; no powers of ten."""
    low, high = axis.get_view_interval()
    decades = float(np.log10(high / low))
    subs = (1,) if decades > 2 else (1, 3) if decades > 1 else (1, 2, 5) if decades > 0.6 else tuple(range(1, 10))
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter(NullFormatter())


def _colours(number: int) -> list[str]:
    if number <= 3:
        return [INK, SECOND, THIRD][:number]
    # Every other colour of tab20 is pale, and hard to see where the page is dark.
    kinds = matplotlib.colormaps["tab10" if number <= 10 else "tab20"]
    return [matplotlib.colors.to_hex(kinds(n % kinds.N)) for n in range(number)]
