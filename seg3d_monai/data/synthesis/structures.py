"""What fluoresces beside objects: specks of debris and fibres such as vessels.

It must not know objects, light or files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from seg3d_monai.data.synthesis.region import Region
from seg3d_monai.data.synthesis.scene import Scene

_STRUCTURES = 17  # stream of draws, after a scene's seed
_EDGE = 3.0  # radii, beyond which a speck or a fibre is dark
Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Structures:
    """S specks and fibres of a volume.

    point: float64 [S, 3], micrometres.
    direction: float64 [S, 3], a unit vector along a fibre, which never ends; zeros for a speck.
    radius: float64 [S], micrometres.
    brightness: float64 [S].
    """

    point: Array
    direction: Array
    radius: Array
    brightness: Array

    def near(self, low_um: Array, high_um: Array) -> list[int]:
        """Numbers of those that a box, from `low_um` to `high_um`, may show."""
        middle, half = (low_um + high_um) / 2, (high_um - low_um) / 2
        offset = middle - self.point
        offset = offset - (offset * self.direction).sum(axis=1, keepdims=True) * self.direction
        is_speck = ~self.direction.any(axis=1)
        in_box = (np.abs(offset) < half + _EDGE * self.radius[:, None]).all(axis=1)
        in_ball = np.linalg.norm(offset, axis=1) < np.linalg.norm(half) + _EDGE * self.radius
        return np.flatnonzero(np.where(is_speck, in_box, in_ball)).tolist()


def structures(scene: Scene, extent_um: Array, num_objects: int) -> Structures:
    """Specks and fibres of a volume; of fibres so many that a region shows equally many in a volume of any size."""
    back, rng = scene.background, np.random.default_rng((*scene.seed, _STRUCTURES))
    area = float(np.prod(extent_um)) ** (2 / 3) / (10 * scene.objects.diameter_um) ** 2
    numbers = (rng.poisson(back.specks * num_objects), rng.poisson(back.fibres * area))
    diameter = np.repeat([back.speck_um, back.fibre_um], numbers)
    bright = np.repeat([back.speck_brightness, back.fibre_brightness], numbers)
    total = sum(numbers)
    direction = rng.standard_normal((total, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    direction[: numbers[0]] = 0
    return Structures(
        point=rng.uniform(0, extent_um, (total, 3)),
        direction=direction,
        radius=diameter / 2 * rng.uniform(0.3, 1, total),
        brightness=bright * rng.uniform(0.2, 1, total),
    )


def add_structures(stain: Array, found: Structures, region: Region, spacing_um: Array) -> None:
    """Add what a region shows of specks and fibres to its stain, in place."""
    for number in found.near(region.start * spacing_um, region.stop * spacing_um):
        point, direction, radius = found.point[number], found.direction[number], found.radius[number]
        low, high = region.start, region.stop
        if not direction.any():
            low = np.maximum(np.floor((point - _EDGE * radius) / spacing_um).astype(int), low)
            high = np.minimum(np.ceil((point + _EDGE * radius) / spacing_um).astype(int) + 1, high)
        part = Region(start=low, stop=high)
        z, y, x = (part.centres_um(axis, spacing_um) - np.float32(point[axis]) for axis in range(3))
        square = (z**2)[:, None, None] + (y**2)[:, None] + x**2
        d = direction.astype(np.float32)
        along = (d[0] * z)[:, None, None] + (d[1] * y)[:, None] + d[2] * x
        square -= along * along
        box = tuple(slice(a, b) for a, b in zip(low - region.start, high - region.start, strict=True))
        stain[box] += np.float32(found.brightness[number]) * np.exp(-np.maximum(square, 0) / np.float32(radius**2))
