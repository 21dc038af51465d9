"""A picture of a volume with its instances: three orthogonal slices or projections, truth and prediction as outlines.

It must not know files other than the picture, models or metrics.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.ndimage import uniform_filter

TRUTH_COLOUR = "#ffb000"
PREDICTION_COLOUR = "#35c9ff"
LONGEST_SIDE_INCH = 8.0


def save_slices(
    path: str | os.PathLike[str],
    image: np.ndarray,
    truth: np.ndarray | None,
    prediction: np.ndarray | None,
    spacing_um: Sequence[float] | None = None,
    title: str | None = None,
    **options: Any,
) -> Path:
    """Write a PNG of `slices_figure`.

    Args:
        path: of the PNG.
        image, truth, prediction, spacing_um, title, options: arguments as for `slices_figure`.

    Returns:
        The path; missing folders are made.
    """
    figure = slices_figure(image, truth, prediction, spacing_um, title, **options)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # An old picture is replaced only when the new one is whole. No version in it: equal data give equal bytes.
    partial = target.with_name(f".partial-{os.getpid()}-{target.name}")
    try:
        figure.savefig(partial, format="png", metadata={"Software": None})
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def slices_figure(
    image: np.ndarray,
    truth: np.ndarray | None,
    prediction: np.ndarray | None,
    spacing_um: Sequence[float] | None = None,
    title: str | None = None,
    *,
    channel: int = 0,
    position: Sequence[int] | None = None,
    gamma: float = 0.6,
    projects: bool = False,
    origin: Sequence[int] = (0, 0, 0),
    longest_inch: float = LONGEST_SIDE_INCH,
    has_key: bool = True,
) -> Figure:
    """Draw the three orthogonal slices through a point, in physical proportions.

    Args:
        image: [Z, Y, X] or [C, Z, Y, X], any real dtype.
        truth: labels [Z, Y, X], or None.
        prediction: labels [Z, Y, X], or None.
        spacing_um: voxel size (z, y, x); None draws cubic voxels and no scale bar.
        title: a line above the picture.
        channel: which channel of a [C, Z, Y, X] image.
        position: voxel (z, y, x) that the slices pass through; None is the middle.
        gamma: exponent of the grey values, > 0; below 1 lifts the dim.
        projects: whether the brightest voxel along each axis is shown in place of a slice, with the instances where
            the image, averaged over 3 voxels along each axis, is brightest.
        origin: voxel (z, y, x) of the volume that the image begins at; places are written as the volume's.
        longest_inch: longest side of the three views together; words keep their size.
        has_key: whether the colours are explained below the picture.

    Raises:
        ValueError: shapes do not fit, or an option is out of its range.
    """
    if image.ndim == 4:
        if not 0 <= channel < image.shape[0]:
            raise ValueError(f"channel={channel} is not in the image of {image.shape[0]} channels")
        image = image[channel]
    if image.ndim != 3 or 0 in image.shape:
        raise ValueError(f"image must be [Z, Y, X] or [C, Z, Y, X] and not empty, got shape {image.shape}")
    for name, labels in (("truth", truth), ("prediction", prediction)):
        if labels is not None and labels.shape != image.shape:
            raise ValueError(f"{name} has shape {labels.shape} and the image {image.shape}; they must be equal")
    if gamma <= 0:
        raise ValueError(f"gamma must be > 0, got {gamma}")
    spacing = np.asarray((1.0, 1.0, 1.0) if spacing_um is None else spacing_um, dtype=np.float64)
    if spacing.shape != (3,) or not np.all(spacing > 0):
        raise ValueError(f"spacing_um must be three positive numbers (z, y, x), got {spacing_um}")
    point = [size // 2 for size in image.shape] if position is None else [int(p) for p in position]
    if len(point) != 3 or any(not 0 <= p < size for p, size in zip(point, image.shape, strict=True)):
        raise ValueError(f"position={tuple(point)} is not in the image of shape {image.shape}")

    depth, height, width = (size * step for size, step in zip(image.shape, spacing, strict=True))
    gap = 0.02 * max(height + depth, width + depth)
    # The side views stand beside the plan at the same scale: YX | YZ over XZ | legend.
    total_width, total_height = width + gap + depth, height + gap + depth
    inch = longest_inch / max(total_width, total_height)
    margin, head, foot = 0.12, 0.40 if title else 0.12, 0.40 if has_key else 0.12
    figure_width = max(total_width * inch + 2 * margin, 4.0 if title or has_key else 0.0)
    figure_height = total_height * inch + head + foot
    figure = Figure(figsize=(figure_width, figure_height), dpi=150, facecolor="black")
    FigureCanvasAgg(figure)

    low, high = (float(value) for value in np.percentile(image[:: max(1, image.shape[0] // 64)], (1.0, 99.8)))
    # Of the raw voxels, noise would choose: outlines would fall to pieces.
    smooth = uniform_filter(image.astype(np.float32), 3) if projects else image
    views = (
        # name, axis that is cut, rows and columns swapped, left, top, width and height in um
        ("YX", 0, False, 0.0, 0.0, width, height),
        ("XZ", 1, False, 0.0, height + gap, width, depth),
        ("YZ", 2, True, width + gap, 0.0, depth, height),
    )
    for name, axis, is_swapped, left, top, view_width, view_height in views:
        axes = figure.add_axes(
            (
                (margin + left * inch) / figure_width,
                1 - (head + (top + view_height) * inch) / figure_height,
                view_width * inch / figure_width,
                view_height * inch / figure_height,
            )
        )
        extent = (0.0, float(view_width), float(view_height), 0.0)
        depths = smooth.argmax(axis=axis) if projects else None
        if projects:
            plane = image.max(axis=axis).T if is_swapped else image.max(axis=axis)
            low, high = (float(value) for value in np.percentile(plane, (1.0, 99.8)))
        else:
            plane = _cut(image, axis, point[axis], is_swapped)
        plane = plane.astype(np.float32)
        grey = np.clip((plane - low) / max(high - low, 1e-6), 0, 1) ** gamma
        axes.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest", aspect="auto")
        # Prediction over truth, thinner: where they agree both colours are seen.
        for labels, colour, line_width in ((truth, TRUTH_COLOUR, 1.7), (prediction, PREDICTION_COLOUR, 0.8)):
            if labels is not None:
                _draw_outlines(axes, _cut(labels, axis, point[axis], is_swapped, depths), extent, colour, line_width)
        axes.set_xlim(extent[0], extent[1])
        axes.set_ylim(extent[2], extent[3])
        axes.set_axis_off()
        place = "brightest" if projects else f"{'zyx'[axis]} = {point[axis] + origin[axis]}"
        axes.text(
            0.02, 0.98, f"{name}  {place}", transform=axes.transAxes, color="white", fontsize=8,
            va="top", bbox={"facecolor": "black", "alpha": 0.5, "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
        if name == "YX" and spacing_um is not None:
            _draw_scale_bar(axes, width, height)
    if title:
        figure.text(0.5, 1 - 0.5 * head / figure_height, title, color="white", fontsize=10, ha="center", va="center")
    handles = [
        Line2D([], [], color=colour, linewidth=line_width, label=name)
        for labels, colour, line_width, name in (
            (truth, TRUTH_COLOUR, 2.0, "truth"),
            (prediction, PREDICTION_COLOUR, 1.2, "prediction"),
        )
        if labels is not None
    ]
    if handles and has_key:
        legend = figure.legend(
            handles=handles, loc="lower center", ncols=2, frameon=False, fontsize=9, bbox_to_anchor=(0.5, 0.0)
        )
        for text in legend.get_texts():
            text.set_color("white")
    return figure


def outline_segments(labels: np.ndarray) -> np.ndarray:
    """The pixel edges between different labels of a plane, so touching instances are parted too.

    Args:
        labels: [H, W] integers, 0 background.

    Returns:
        float64 [S, 2, 2]: segments of ((row, column), (row, column)) in pixel edges, 0 to H and 0 to W. Straight runs
        are one segment. An instance that leaves the plane is open there.
    """
    segments: list[tuple[tuple[int, int], tuple[int, int]]] = []
    for is_transposed in (False, True):
        plane = labels.T if is_transposed else labels
        # An edge between row r and row r + 1 lies at r + 1.
        differs = (plane[1:] != plane[:-1]).astype(np.int8)
        steps = np.diff(np.pad(differs, ((0, 0), (1, 1))), axis=1)
        rows, starts = np.nonzero(steps == 1)
        _, stops = np.nonzero(steps == -1)
        for row, start, stop in zip((rows + 1).tolist(), starts.tolist(), stops.tolist(), strict=True):
            ends = ((row, start), (row, stop))
            segments.append(((start, row), (stop, row)) if is_transposed else ends)
    return np.array(segments, dtype=np.float64).reshape(-1, 2, 2)


def _cut(array: np.ndarray, axis: int, index: int, is_swapped: bool, depths: np.ndarray | None = None) -> np.ndarray:
    """A slice, or, with `depths`, the voxel at a depth of its own in each line along the axis."""
    if depths is None:
        plane = np.take(array, index, axis=axis)
    else:
        plane = np.take_along_axis(array, np.expand_dims(depths, axis), axis).squeeze(axis)
    return plane.T if is_swapped else plane


def _draw_outlines(
    axes: Axes, labels: np.ndarray, extent: tuple[float, float, float, float], colour: str, line_width: float
) -> None:
    segments = outline_segments(labels)[:, :, ::-1]
    scale = np.array([extent[1] / labels.shape[1], extent[2] / labels.shape[0]])
    axes.add_collection(LineCollection(segments * scale, colors=colour, linewidths=line_width, capstyle="projecting"))


def _draw_scale_bar(axes: Axes, width_um: float, height_um: float) -> None:
    wished = width_um / 5
    magnitude = 10.0 ** np.floor(np.log10(wished))
    length = float(max(step * magnitude for step in (1, 2, 5) if step * magnitude <= wished))
    right, y = 0.97 * width_um, 0.96 * height_um
    axes.plot([right - length, right], [y, y], color="white", linewidth=2.5, solid_capstyle="butt")
    # To the right: in a small picture the words are longer than the bar, and must not leave it.
    axes.text(right, y - 0.02 * height_um, f"{length:g} µm", color="white", fontsize=8, ha="right", va="bottom")
