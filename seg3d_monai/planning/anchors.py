"""Anchor shapes out of the boxes of a data set: k-means with 1 - IoU as distance (YOLO9000, Redmon and Farhadi 2017).

Euclidean means would fit the large boxes and miss the small ones; IoU is what anchors are matched by. Shapes are
compared as if both lay on one centre. Must not know: rules, bundles, torch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

MOST_SHAPES, NUM_STARTS, MOST_ROUNDS = 4000, 8, 60
SPREAD = 1.25
"""Factor between anchors that stand in where there are fewer distinct shapes than anchors."""


def shape_iou(shapes: ArrayLike, others: ArrayLike) -> Floats:
    """IoU of boxes on one centre.

    Args:
        shapes: [n, 3] extents.
        others: [k, 3] extents, all positive.

    Returns:
        [n, k].
    """
    one, two = np.asarray(shapes, float)[:, None], np.asarray(others, float)[None]
    common = np.minimum(one, two).prod(axis=2)
    iou: Floats = common / (one.prod(axis=2) + two.prod(axis=2) - common)
    return iou


def mean_best_iou(shapes: ArrayLike, anchors: ArrayLike) -> float:
    """Mean over shapes [n, 3] of the IoU with the best of the anchors [k, 3]."""
    return float(shape_iou(shapes, anchors).max(axis=1).mean())


def cluster_shapes(shapes: ArrayLike, num_anchors: int, *, seed: int = 0) -> Floats:
    """Anchors that fit boxes best.

    Args:
        shapes: [n, 3] extents of boxes, n >= 1, all positive.
        num_anchors: k.
        seed: of the starts, and of the sample where there are very many shapes.

    Returns:
        [k, 3] extents by ascending volume. With fewer distinct shapes than k, those and scaled copies of their median.

    Raises:
        ValueError: no shape, or an extent that is not positive.
    """
    shapes = np.asarray(shapes, float).reshape(-1, 3)
    if not len(shapes) or shapes.min() <= 0:
        raise ValueError(f"shapes are {shapes.tolist()[:3]}; give at least one, of three positive extents")
    rng = np.random.default_rng(seed)
    if len(shapes) > MOST_SHAPES:
        shapes = rng.choice(shapes, MOST_SHAPES, replace=False)
    distinct = np.unique(shapes, axis=0)
    if len(distinct) <= num_anchors:
        return _by_volume(_filled_up(distinct, np.median(shapes, axis=0), num_anchors))
    order = shapes[np.argsort(shapes.prod(axis=1), kind="stable")]
    spread = order[((np.arange(num_anchors) + 0.5) / num_anchors * len(order)).astype(int)]
    starts = [spread, *(rng.choice(distinct, num_anchors, replace=False) for _ in range(NUM_STARTS - 1))]
    found = [_k_means(shapes, start) for start in starts]
    return _by_volume(max(found, key=lambda anchors: mean_best_iou(shapes, anchors)))


def _k_means(shapes: Floats, anchors: Floats) -> Floats:
    """Lloyd's rounds from a start, with medians, which the few very long boxes do not pull; the best round counts."""
    best, best_iou = anchors, -1.0
    for _ in range(MOST_ROUNDS):
        iou = shape_iou(shapes, anchors)
        if iou.max(axis=1).mean() <= best_iou + 1e-6:
            break
        best, best_iou = anchors, float(iou.max(axis=1).mean())
        nearest = iou.argmax(axis=1)
        anchors = anchors.copy()
        for k in np.unique(nearest):
            anchors[k] = np.median(shapes[nearest == k], axis=0)
    return best


def _filled_up(distinct: Floats, median: Floats, num_anchors: int) -> Floats:
    """The shapes themselves, then the median smaller, larger, smaller still …"""
    steps = np.arange(2, 2 * num_anchors + 2)
    factors = SPREAD ** (steps // 2 * np.where(steps % 2, 1.0, -1.0))
    copies = factors[:, None] * median
    return np.concatenate([distinct, copies])[:num_anchors]


def _by_volume(anchors: Floats) -> Floats:
    return anchors[np.argsort(anchors.prod(axis=1), kind="stable")]
