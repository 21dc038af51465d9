"""Rules of a plan for the network: strides, anchors, the grids of masks, queries, and how many boxes are kept.

A rule is a pure function of measurements. It returns a value and the reason in words.
Must not know: bundles, files, torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seg3d_monai.planning.anchors import cluster_shapes, mean_best_iou
from seg3d_monai.planning.wording import by, number

Floats = NDArray[np.float64]
Triple = tuple[int, int, int]

FINE_CELLS = 8
"""Cells of the finest level that a median object spans at least: the mask is drawn from them."""
THIN = 0.5
"""An axis with fewer cells than this share of the most is not halved until the others have come down to it."""
LEAST_CELLS = 2.0
"""Cells of an anchor level that its objects span at least."""
MASK_BINS = (4, 14)
"""Fewest and most bins of the mask head along an axis."""
QUERIES_PER_OBJECT, FEWEST_QUERIES, QUERY_STEP = 5.0, 100, 50
"""Queries for one object of a crowded crop, since a block of a prediction shows more than a crop; the fewest queries;
what their number is a multiple of."""
IMAGE_VOXELS = 5_000_000
"""Voxels of an image that the limits of proposals and detections are meant for (`MaskRCNN3d`)."""
PER_OBJECT = {"detections": 2, "proposals": 5, "anchors": 20, "samples": 2}
"""What is kept for each object at least."""
MOST_SAMPLES = 512


def strides(median: Sequence[float], num_stages: int) -> tuple[tuple[Triple, list[Triple]], str]:
    """Stride of the stem and of each stage, (z, y, x).

    Args:
        median: (z, y, x) extent of the median object, voxels.
        num_stages: of the backbone.
    """
    cells = np.array(median, float)
    steps: list[Triple] = []
    for depth in range(num_stages + 1):
        if depth < 2:  # stem and first stage make the finest level
            is_halved = cells / 2 >= FINE_CELLS
        else:
            is_halved = cells >= THIN * cells.max()
        step = [2 if halved else 1 for halved in is_halved]
        cells = cells / step
        steps.append((step[0], step[1], step[2]))
    finest = [a * b for a, b in zip(steps[0], steps[1], strict=True)]
    return (steps[0], steps[1:]), (
        f"the finest level, of stride {by(finest)}, leaves {FINE_CELLS} or more cells of a median object "
        f"({by(median)}) where it strides at all; then every axis is halved, a thin one later"
    )


def anchor_levels(
    level_strides: Mapping[str, Sequence[int]], num_levels: int, small: Sequence[float], large: Sequence[float]
) -> tuple[list[str], str]:
    """Levels of the pyramid that anchors lie on, finest first.

    Args:
        level_strides: (z, y, x) stride of each level by name, finest first.
        num_levels: how many.
        small, large: (z, y, x) extents of small and of large objects, voxels.
    """
    names = list(level_strides)
    steps = np.array([level_strides[name] for name in names])

    def coarsest(extent: Sequence[float]) -> int:
        fits = (LEAST_CELLS * steps <= np.array(extent)).all(axis=1)
        return int(np.flatnonzero(fits).max(initial=0))

    num_levels = min(num_levels, len(names))
    first = min(coarsest(small), max(0, coarsest(large) - num_levels + 1), len(names) - num_levels)
    chosen = names[first : first + num_levels]
    return chosen, (
        f"small objects ({by(small)}) span {number(LEAST_CELLS)} cells of {chosen[0]}, and large ones ({by(large)}) of "
        f"{chosen[-1]}, or the finest levels there are"
    )


def anchor_shapes(extents: Floats, default: ArrayLike, num_levels: int) -> tuple[list[list[list[float]]], str]:
    """Anchor shapes of each level, the smallest on the finest.

    Args:
        extents: [n, 3] of objects, voxels.
        default: the bundle's, [levels, anchors, 3]; as many anchors a level are found.
        num_levels: levels with anchors.
    """
    before = np.asarray(default, float)
    num_anchors = before.shape[1]
    found = cluster_shapes(extents, num_levels * num_anchors)
    found = np.maximum(0.5, np.round(2 * found) / 2)
    shapes: list[list[list[float]]] = found.reshape(num_levels, num_anchors, 3).tolist()
    fit_before, fit_after = (mean_best_iou(extents, anchors.reshape(-1, 3)) for anchors in (before, found))
    return shapes, (
        f"clustered from {len(extents)} boxes by IoU: the best anchor of a box has an IoU of {fit_after:.2f} on "
        f"average, with the bundle's {fit_before:.2f}"
    )


def mask_roi_size(typical: Sequence[float]) -> tuple[Triple, str]:
    """Bins of the mask head along (z, y, x); masks have twice as many.

    Args:
        typical: extents that three quarters of the objects do not exceed, voxels.
    """
    low, high = MASK_BINS
    z, y, x = (min(high, max(low, 2 * math.floor(extent / 4 + 0.5))) for extent in typical)
    return (z, y, x), (
        f"a mask's cell is then about a voxel of the objects, of which three quarters are at most {by(typical)}"
    )


def num_queries(crowded: float) -> tuple[int, str]:
    """Queries of a transformer.

    Args:
        crowded: objects of a crowded crop.
    """
    wanted = max(FEWEST_QUERIES, QUERY_STEP * math.floor(QUERIES_PER_OBJECT * crowded / QUERY_STEP + 0.5))
    return wanted, (
        f"{number(QUERIES_PER_OBJECT)} for each of the {number(crowded)} objects of a crowded crop (99th percentile), "
        f"{FEWEST_QUERIES} at least: a block of a prediction shows more than a crop"
    )


def most_detections(density: float, default: int) -> tuple[int, str]:
    """Detections kept of an image.

    Args:
        density: objects a voxel of a crowded volume.
        default: the bundle's, which is not lowered: a limit costs nothing until it is reached.
    """
    objects = density * IMAGE_VOXELS
    wanted = _at_least(default, PER_OBJECT["detections"] * objects, 500)
    return wanted, _limit_reason("an image of 5 million voxels", objects, PER_OBJECT["detections"])


def kept_boxes(kind: str, crowded: float, density: float, default: Sequence[int]) -> tuple[tuple[int, int], str]:
    """Anchors or proposals kept of an image, (training, evaluation).

    Args:
        kind: "anchors" (of a level, before NMS) or "proposals" (after it).
        crowded: objects of a crowded crop.
        density: objects a voxel of a crowded volume.
        default: the bundle's, which is not lowered.
    """
    objects = density * IMAGE_VOXELS
    train = _at_least(default[0], PER_OBJECT[kind] * crowded, 100)
    evaluation = _at_least(default[1], PER_OBJECT[kind] * objects, 1000)
    return (train, evaluation), _limit_reason("a crowded crop, in training", crowded, PER_OBJECT[kind]) + (
        f"; {number(objects)} in an image of 5 million voxels"
    )


def num_samples(crowded: float, default: int) -> tuple[int, str]:
    """Anchors or proposals of an image that enter the loss; `default` is not lowered."""
    wanted = min(MOST_SAMPLES, _at_least(default, PER_OBJECT["samples"] * crowded, 64))
    return max(default, wanted), _limit_reason("a crowded crop", crowded, PER_OBJECT["samples"])


def _at_least(default: int, wanted: float, step: int) -> int:
    return default if wanted <= default else step * math.ceil(wanted / step)


def _limit_reason(where: str, objects: float, factor: int) -> str:
    return f"{factor} or more for each of the {number(objects)} objects of {where}"
