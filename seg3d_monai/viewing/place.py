"""Where things lie in the viewer's world, in micrometres: its origin is the centre of the image's first voxel at full
resolution, along z, y and x.

It must not know files or napari.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Any

import numpy as np

from seg3d_monai.data.volume import Roi
from seg3d_monai.viewing.stack import Floats, Level


@dataclass(frozen=True, kw_only=True)
class Place:
    """What is viewed of the image.

    spacing: (z, y, x) of a voxel at full resolution, in `unit`.
    unit: "um", or "pixel" where the voxel size is unknown.
    shown: the image's level whose voxels `roi` counts.
    roi: (z1, y1, x1, z2, y2, x2), None for all.
    is_single: one level only is shown, not all from full resolution on.
    is_series: layers have an axis of time before the others.
    """

    spacing: Floats
    unit: str
    shown: Level
    roi: Roi | None
    is_single: bool
    is_series: bool

    def layer(self, factor: Sequence[float], low: Sequence[int] = (0, 0, 0), is_series: bool = False) -> dict[str, Any]:
        """A layer's scale, translation, units and names of axes.

        Args:
            factor: (z, y, x) voxels of full resolution per voxel of the layer.
            low: (z, y, x) of the layer's first voxel in its level.
            is_series: whether it has an axis of time, one step a time point.
        """
        scale = [f * s for f, s in zip(factor, self.spacing, strict=True)]
        shift = [((f - 1) / 2 + a * f) * s for f, a, s in zip(factor, low, self.spacing, strict=True)]
        first = 1 if is_series else 0
        return {
            "scale": (*[1.0] * first, *scale),
            "translate": (*[0.0] * first, *shift),
            "units": (*["pixel"] * first, *[self.unit] * 3),
            "axis_labels": tuple("tzyx"[1 - first :]),
        }

    def roi_of(self, level: Level, factor: Sequence[float]) -> Roi:
        """The viewed region in the voxels of a level: all that have a part in it.

        Args:
            level: whose voxels.
            factor: (z, y, x) voxels of the image at full resolution per voxel of the level.
        """
        if self.roi is None:
            return (0, 0, 0, *level.shape)
        low = [floor(a * f / g) for a, f, g in zip(self.roi[:3], self.shown.factor, factor, strict=True)]
        high = [
            min(n, max(a + 1, ceil(b * f / g)))
            for n, a, b, f, g in zip(level.shape, low, self.roi[3:], self.shown.factor, factor, strict=True)
        ]
        return (low[0], low[1], low[2], high[0], high[1], high[2])

    def inside(self, points: np.ndarray, factor: Sequence[float]) -> np.ndarray:
        """Whether points lie in the viewed region.

        Args:
            points: [N, 3] z, y, x, voxels of a level; a voxel's centre is its index.
            factor: (z, y, x) voxels of full resolution per voxel of that level.

        Returns:
            bool [N].
        """
        if self.roi is None:
            return np.ones(len(points), bool)
        edges = (points + 0.5) * np.asarray(factor)
        low, high = (np.asarray(corner) * np.asarray(self.shown.factor) for corner in (self.roi[:3], self.roi[3:]))
        return ((edges >= low) & (edges < high)).all(axis=1)
