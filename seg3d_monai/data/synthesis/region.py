"""Regions of a volume without an end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Region:
    """Voxels from `start` to before `stop`, (z, y, x); `start` may be negative."""

    start: Array
    stop: Array

    def grown(self, by: Array) -> Region:
        """With so many voxels more on every side."""
        return Region(start=self.start - by, stop=self.stop + by)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Extent in voxels."""
        z, y, x = (self.stop - self.start).tolist()
        return z, y, x

    def centres_um(self, axis: int, spacing_um: Array) -> Array:
        """Places of the voxels' centres along an axis, micrometres, float32."""
        places = (np.arange(self.start[axis], self.stop[axis]) + 0.5) * spacing_um[axis]
        return places.astype(np.float32)
