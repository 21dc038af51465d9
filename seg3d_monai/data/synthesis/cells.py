"""Which voxel belongs to which object, and how far it lies from the surfaces of the nearest two.

An object is one deformed ellipsoid or several. A voxel that two objects claim goes to the one whose surface is
relatively farther away, so no two overlap and crowded ones press faces on each other.

It must not know light, cameras or files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from seg3d_monai.data.synthesis.placement import Shapes
from seg3d_monai.data.synthesis.scene import FAMILIES

FAR = 3.0
"""Relative distance of what is farther than painted."""
RIM = 1.35
"""Distances are painted so far, in reaches of an object: stains need them beyond the surface."""
_LOBED, _DIVIDING = FAMILIES.index("lobed"), FAMILIES.index("dividing")
_DAUGHTER, _APART = np.array([0.5, 0.9, 0.9]), 0.43  # of the mother's radii, the longest first
Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Objects as the parts that are painted.

    shapes: the P parts.
    owner: int64 [P], number of a part's object, ascending, all from 1 to `num_objects`.
    family: int64 [G], of `FAMILIES`, by number - 1.
    """

    shapes: Shapes
    owner: Array
    family: Array

    @property
    def num_objects(self) -> int:
        """G, how many objects."""
        return len(self.family)

    def centres(self) -> Array:
        """Means of the centres of their parts, micrometres [G, 3]."""
        count = np.bincount(self.owner - 1, minlength=self.num_objects)
        sums = [np.bincount(self.owner - 1, self.shapes.centre[:, axis], self.num_objects) for axis in range(3)]
        return np.stack(sums, axis=1) / count[:, None]

    def volumes(self) -> Array:
        """Volumes of their parts without bumps, added up, cubic micrometres [G]."""
        volume = 4 / 3 * np.pi / np.abs(np.linalg.det(self.shapes.axes))
        return np.bincount(self.owner - 1, volume, self.num_objects)


def as_cells(rng: np.random.Generator, placed: Shapes) -> Cells:
    """Make two daughters of what divides, and lobes of what is lobed.

    Args:
        rng: for the lobes.
        placed: from `place_shapes`.
    """
    parts, owners, family = [], [], []
    number = 0
    plain = (placed.family != _LOBED) & (placed.family != _DIVIDING)
    kept = placed[plain]
    parts.append(kept)
    owners.append(np.arange(1, len(kept) + 1))
    family.append(kept.family)
    number += len(kept)
    mothers = placed[placed.family == _DIVIDING]
    for side in (-1, 1):
        parts.append(_daughters(mothers, side))
        owners.append(np.arange(number + 1, number + len(mothers) + 1))
        family.append(mothers.family)
        number += len(mothers)
    lobed = placed[placed.family == _LOBED]
    num_lobes = rng.integers(2, 4, len(lobed))
    for lobe in range(3):
        which = np.flatnonzero(num_lobes > lobe)
        parts.append(_lobes(rng, lobed[which], is_first=lobe == 0))
        owners.append(number + 1 + which)
    family.append(lobed.family)
    shapes, owner = Shapes.joined(parts), np.concatenate(owners)
    order = np.argsort(owner, kind="stable")
    return Cells(shapes=shapes[order], owner=owner[order], family=np.concatenate(family))


def _daughters(mothers: Shapes, side: int) -> Shapes:
    """One of two flat ellipsoids that meet at the middle of the mother's longest axis."""
    radii = 1 / np.linalg.norm(mothers.axes, axis=2)
    order = np.argsort(-radii, axis=1)
    share = np.empty_like(radii)
    np.put_along_axis(share, order, np.broadcast_to(_DAUGHTER, radii.shape), axis=1)
    longest = np.take_along_axis(mothers.axes, order[:, :1, None], axis=1)[:, 0]
    long_radius = np.take_along_axis(radii, order[:, :1], axis=1)
    along = longest * long_radius  # the unit vector
    return replace(
        mothers,
        centre=mothers.centre + side * _APART * long_radius * along,
        axes=mothers.axes / share[:, :, None],
        reach_um=mothers.reach_um * _DAUGHTER.max(),
    )


def _lobes(rng: np.random.Generator, lobed: Shapes, is_first: bool) -> Shapes:
    """The main part of a lobed object, or a smaller one at its side."""
    size = rng.uniform(0.7, 0.8, len(lobed)) if is_first else rng.uniform(0.5, 0.7, len(lobed))
    direction = rng.standard_normal((len(lobed), 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    away = np.zeros(len(lobed)) if is_first else 0.6 * lobed.radius(direction)
    return replace(
        lobed,
        centre=lobed.centre + away[:, None] * direction,
        axes=lobed.axes / size[:, None, None],
        reach_um=lobed.reach_um * size,
    )


@dataclass(frozen=True, kw_only=True)
class Painted:
    """A painted region, each [d, h, w].

    nearest_object: int32, number of the object that is relatively nearest, 0 where none is near.
    nearest: float32, relative distance to its surface: 1 on it, less inside.
    runner_up: float32, that to the nearest other object.
    """

    nearest_object: Array
    nearest: Array
    runner_up: Array

    def owner(self, reach: float) -> Array:
        """Numbers of the objects, int32, 0 for background, where objects spread so far."""
        return np.where(self.nearest < reach, self.nearest_object, 0)


class Painter:
    """Paints regions of a scene's voxels; what comes out for a voxel does not depend on the region.

    Args:
        cells: objects.
        spacing_um: (z, y, x) micrometres per voxel.
        reach: how far objects spread, in radii.
    """

    def __init__(self, cells: Cells, spacing_um: Array, reach: float) -> None:
        self._cells, self._spacing = cells, spacing_um
        shapes = cells.shapes
        away = RIM * reach * shapes.reach_um[:, None]
        low = np.floor((shapes.centre - away) / spacing_um - 0.5).astype(np.int64)
        high = np.ceil((shapes.centre + away) / spacing_um + 0.5).astype(np.int64)
        # The voxels that each object may touch, all of its parts together.
        self._lows, self._highs = (np.full((cells.num_objects, 3), fill, np.int64) for fill in (1 << 60, -(1 << 60)))
        np.minimum.at(self._lows, cells.owner - 1, low)
        np.maximum.at(self._highs, cells.owner - 1, high)
        self._first_part = np.searchsorted(cells.owner, np.arange(1, cells.num_objects + 2))
        self._has_bumps = bool(np.abs(shapes.cubic[:, 0]).any() or np.abs(shapes.quadratic).any())

    def paint(self, start: Array, stop: Array) -> Painted:
        """Paint the voxels from `start` to before `stop`, (z, y, x); `start` may be negative."""
        size = tuple(int(n) for n in stop - start)
        nearest_object = np.zeros(size, np.int32)
        nearest = np.full(size, FAR, np.float32)
        runner_up = np.full(size, FAR, np.float32)
        touches = ((self._highs > start) & (self._lows < stop)).all(axis=1)
        for number in (np.flatnonzero(touches) + 1).tolist():
            low, high = np.maximum(self._lows[number - 1], start), np.minimum(self._highs[number - 1], stop)
            distance = self._distance(number, low, high)
            box = tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))
            here, first, second = nearest_object[box], nearest[box], runner_up[box]
            wins = distance < first
            second[...] = np.where(wins, first, np.minimum(second, distance))
            first[wins] = distance[wins]
            here[wins] = number
        return Painted(nearest_object=nearest_object, nearest=nearest, runner_up=runner_up)

    def _distance(self, number: int, low: Array, high: Array) -> Array:
        """Relative distance of some voxels to the surface of an object, that of its nearest part."""
        shapes = self._cells.shapes
        found: Array | None = None
        for part in range(self._first_part[number - 1], self._first_part[number]):
            places = [
                ((np.arange(a, b) + 0.5) * step - middle).astype(np.float32)
                for a, b, step, middle in zip(low, high, self._spacing, shapes.centre[part], strict=True)
            ]
            bumps = (shapes.quadratic[part], shapes.cubic[part]) if self._has_bumps else None
            own = _distance(places, shapes.axes[part].astype(np.float32), bumps)
            found = own if found is None else np.minimum(found, own)
        assert found is not None
        return found


def _distance(places: list[Array], axes: Array, bumps: tuple[Array, Array] | None) -> Array:
    """Distance of each voxel of a box from a part's centre, in radii of its surface along that direction."""
    z, y, x = places
    unit = [(row[0] * z[:, None] + row[1] * y)[:, :, None] + row[2] * x for row in axes]
    norm = np.sqrt(unit[0] * unit[0] + unit[1] * unit[1] + unit[2] * unit[2])
    return norm if bumps is None else norm / _bumps(unit, norm, *bumps)


def _bumps(unit: list[Array], norm: Array, quadratic: Array, cubic: Array) -> Array:
    """Radius of the surface along a direction, in radii of the ellipsoid."""
    inverse = 1 / (norm + np.float32(1e-6))
    u, v, w = (each * inverse for each in unit)
    q, c = quadratic.astype(np.float32), cubic.astype(np.float32)
    bump = u * (q[0, 0] * u + (2 * q[0, 1]) * v + (2 * q[0, 2]) * w) + v * (q[1, 1] * v + (2 * q[1, 2]) * w)
    bump += q[2, 2] * (w * w)
    odd = c[0, 0] * u + c[0, 1] * v + c[0, 2] * w
    for row in c[1:]:
        odd *= row[0] * u + row[1] * v + row[2] * w
    bump += odd
    bump += 1
    return bump
