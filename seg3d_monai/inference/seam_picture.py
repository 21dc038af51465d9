"""The picture of a seam check: both answers and the faces of both grids, in three slices through the worst place.

Knows the report and the label arrays of `seam_check`; must not know models or how the answers were compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from seg3d_monai.data.volume import Volume
from seg3d_monai.inference.blocks import Roi, Triple, roi_slices
from seg3d_monai.inference.seam_cells import KINDS, Cell, Faces
from seg3d_monai.inference.seam_report import SeamReport

FIRST_COLOUR, SECOND_COLOUR = "#ffb000", "#35c9ff"  # amber and sky: apart for every kind of colour blindness


def save_picture(
    path: Path,
    volume: Volume,
    first: NDArray[np.integer],
    second: NDArray[np.integer],
    faces: Sequence[Faces],
    report: SeamReport,
) -> None:
    """Three orthogonal slices, a block wide, through the place with the most disagreements."""
    point = _worst_place(report)
    window = _window(point, report.block_size, report.roi)
    inside = roi_slices(window, report.roi[:3])
    image = volume.read(window)[0].astype(np.float32)
    low, high = (float(v) for v in np.percentile(image, (1, 99.8)))
    grey = np.clip((image - low) / max(high - low, 1e-6), 0, 1) ** 0.6  # lifts the dim
    step = (1.0, 1.0, 1.0) if report.spacing_um is None else report.spacing_um
    depth, height, width = (n * s for n, s in zip(image.shape, step, strict=True))

    # YX | ZY over XZ, all at one scale in inches, with room for ticks around each.
    inch = 6.5 / max(width, height)
    depth_inch, height_inch, width_inch = (max(extent * inch, 0.6) for extent in (depth, height, width))
    left, gap, head, foot = 0.75, 0.65, 1.0, 1.15
    figure_width = max(left + width_inch + gap + depth_inch + 0.25, 7.5)
    figure_height = head + height_inch + gap + depth_inch + foot
    figure = Figure(figsize=(figure_width, figure_height), dpi=130, facecolor="black")
    FigureCanvasAgg(figure)
    beside, below = left + width_inch + gap, foot
    views = (  # cut axis, axis down, axis across, left, bottom, width, height
        (0, 1, 2, left, below + depth_inch + gap, width_inch, height_inch),
        (1, 0, 2, left, below, width_inch, depth_inch),
        (2, 1, 0, beside, below + depth_inch + gap, depth_inch, height_inch),
    )
    for cut, down, across, x, y, w, h in views:
        panel = figure.add_axes((x / figure_width, y / figure_height, w / figure_width, h / figure_height))
        planes = []
        for array in (grey, first[inside], second[inside]):
            plane = np.take(array, point[cut] - window[cut], axis=cut)
            planes.append(plane if down < across else plane.T)
        _draw_slice(panel, planes, window, down, across, [(grid[down], grid[across]) for grid in faces])
        panel.set_title(f"{'zyx'[cut]} = {point[cut]}", color="white", fontsize=9)
        for cell in report.disagreements:
            if cell.box[cut] <= point[cut] < cell.box[cut + 3]:
                _name(panel, cell, planes[1:], (window[down], window[across]))

    near, far = report.at_faces, report.away
    kinds = Counter(cell.kind for cell in report.disagreements)
    title = (
        f"two grids of blocks differ on {near.num_disagreeing} of {near.num_cells} cells at faces, "
        f"{far.num_disagreeing} of {far.num_cells} away\n" + ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS)
    )
    figure.text(0.5, 1 - 0.4 / figure_height, title, color="white", fontsize=10, ha="center", va="center")
    handles: list[Any] = [
        Line2D([], [], color=FIRST_COLOUR, linewidth=3.2, label="first grid's objects"),
        Line2D([], [], color=SECOND_COLOUR, linewidth=1.1, label="second grid's objects"),
        Line2D([], [], color=FIRST_COLOUR, linewidth=1.2, linestyle="--", label="first grid's faces"),
        Line2D([], [], color=SECOND_COLOUR, linewidth=1.2, linestyle="--", label="second grid's faces"),
    ]
    legend = figure.legend(handles=handles, loc="lower center", ncols=2, frameon=False, fontsize=9)
    for entry in legend.get_texts():
        entry.set_color("white")
    figure.savefig(path, format="png", metadata={"Software": None})  # equal reports give equal bytes


def _worst_place(report: SeamReport) -> Triple:
    """The voxel at a disagreement that has the most others within half a block, or the middle."""
    if report.disagreements:
        centres = np.array([cell.centroid for cell in report.disagreements])
        scaled = centres / report.block_size
        near = cKDTree(scaled).query_ball_point(scaled, r=0.5, p=np.inf, return_length=True)
        z, y, x = (int(v) for v in np.rint(centres[np.argmax(near)]))
    else:
        z, y, x = ((a + b) // 2 for a, b in zip(report.roi[:3], report.roi[3:], strict=True))
    return z, y, x


def _window(point: Triple, size: Triple, roi: Roi) -> Roi:
    """A ROI of that size around a point, moved and clipped into another one."""
    lower = [max(min(p - s // 2, roi[a + 3] - s), roi[a]) for a, (p, s) in enumerate(zip(point, size, strict=True))]
    z2, y2, x2 = (min(low + s, roi[a + 3]) for a, (low, s) in enumerate(zip(lower, size, strict=True)))
    return lower[0], lower[1], lower[2], z2, y2, x2


def _draw_slice(
    panel: Axes,
    planes: Sequence[NDArray[Any]],
    window: Roi,
    down: int,
    across: int,
    faces: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> None:
    """Image, outlines and faces; the ticks are volume voxels."""
    grey, *answers = planes
    extent = (window[across], window[across + 3], window[down + 3], window[down])
    panel.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest", aspect="auto")
    # The second over the first, thinner: where they agree both colours are seen.
    styles = ((FIRST_COLOUR, 3.2), (SECOND_COLOUR, 1.0))
    for labels, lines, (colour, line_width) in zip(answers, faces, styles, strict=True):
        edges = _outlines(labels) + (window[across], window[down])
        panel.add_collection(LineCollection(list(edges), colors=colour, linewidths=line_width, capstyle="projecting"))
        for face in lines[0]:
            panel.axhline(face, color=colour, linewidth=1.2, linestyle=(0, (6, 4)))
        for face in lines[1]:
            panel.axvline(face, color=colour, linewidth=1.2, linestyle=(0, (6, 4)))
    panel.set_xlim(extent[0], extent[1])
    panel.set_ylim(extent[2], extent[3])
    panel.set_xlabel("zyx"[across], color="white", fontsize=9)
    panel.set_ylabel("zyx"[down], color="white", fontsize=9)
    panel.tick_params(colors="white", labelsize=7)


def _outlines(labels: NDArray[np.integer]) -> NDArray[np.float64]:
    """[S, 2, 2] edges ((x, y), (x, y)) between pixels of different labels of a plane [H, W], in pixel edges."""
    row, column = np.nonzero(labels[:, 1:] != labels[:, :-1])
    upright = np.stack([np.stack([column + 1, row], 1), np.stack([column + 1, row + 1], 1)], axis=1)
    row, column = np.nonzero(labels[1:] != labels[:-1])
    level = np.stack([np.stack([column, row + 1], 1), np.stack([column + 1, row + 1], 1)], axis=1)
    return np.concatenate([upright, level]).astype(np.float64)


def _name(panel: Axes, cell: Cell, answers: Sequence[NDArray[np.integer]], corner: tuple[int, int]) -> None:
    """The kind of a cell, written in the middle of its pixels in the slice, if it has any there."""
    first, second = answers
    rows, columns = np.nonzero(np.isin(first, cell.first_ids) | np.isin(second, cell.second_ids))
    if len(rows):
        panel.text(
            corner[1] + columns.mean() + 0.5, corner[0] + rows.mean() + 0.5, cell.kind, color="white", fontsize=8,
            ha="center", va="center", clip_on=True,
            bbox={"facecolor": "black", "alpha": 0.65, "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip
