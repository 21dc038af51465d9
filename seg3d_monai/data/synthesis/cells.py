"""Which voxel belongs to which object, and how far it lies from the surfaces of the nearest two.

An object is one deformed ellipsoid or several. A voxel that two objects claim goes to the one whose surface is
relatively farther away, so no two overlap and crowded ones press faces on each other.

It must not know light, cameras or files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from seg3d_monai.data.synthesis.placement import Shapes
from seg3d_monai.data.synthesis.scene import FAMILIES

FAR = 3.0
"""Relative distance of what is farther than painted."""
_SLAB_VOXELS = 1 << 15
_LITTLE = np.float32(1e-8)  # of a squared radius
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


def grown(cells: Cells, squares_um2: Array) -> Cells:
    """Parts whose squared radii are larger, as a Gaussian filter makes a Gaussian wider; bumps grow along.

    Args:
        cells: objects.
        squares_um2: [P, 3], what is added along (z, y, x) for each part, square micrometres.
    """
    axes = cells.shapes.axes
    # With S added to its squared radii an ellipsoid |A x| = 1 becomes |(1 + A S A')^(-1/2) A x| = 1.
    wider = np.eye(3) + np.einsum("gij,gj,gkj->gik", axes, squares_um2, axes)
    values, vectors = np.linalg.eigh(wider)
    shrink = np.einsum("gij,gj,gkj->gik", vectors, values**-0.5, vectors)
    reach_um = cells.shapes.reach_um * np.sqrt(values.max(axis=1, initial=1))
    return replace(cells, shapes=replace(cells.shapes, axes=shrink @ axes, reach_um=reach_um))


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

    nearest_object: int32, number of the object that is relatively nearest, 0 where none is within the painter's limit.
    nearest: float32, relative distance to its surface: 1 on it, less inside; `FAR` where there is none.
    runner_up: float32, that to the nearest other object within the limit, at most the painter's `gap` more.
    """

    nearest_object: Array
    nearest: Array
    runner_up: Array

    def owner(self, reach: float) -> Array:
        """Numbers of the objects, int32, 0 for background, where objects spread so far."""
        return np.where(self.nearest < reach, self.nearest_object, 0)


class Painter:
    """Paints regions of a scene's voxels; what comes out for a voxel does not depend on the region.

    With u a place in the unit ball of an ellipsoid, n its length, Q its even and c1, c2, c3 its odd bumps, the relative
    distance is n / (1 + u'Qu / n^2 + (c1 u)(c2 u)(c3 u) / n^3), here n^4 / (n (n^2 + u'Qu) + (c1 u)(c2 u)(c3 u)). All
    are forms of the place in micrometres, so a voxel takes a few operations, worked out by slabs that fit into a cache.

    Args:
        cells: objects.
        spacing_um: (z, y, x) micrometres per voxel.
        limit: relative distance up to which an object is painted.
        gap: how much farther than the nearest a runner-up may be to be told, in relative distance.
    """

    def __init__(self, cells: Cells, spacing_um: Array, limit: float, gap: float) -> None:
        self._cells, self._spacing, self._limit, self._gap = cells, spacing_um, min(limit, FAR), gap
        shapes = cells.shapes
        self._first_part = np.searchsorted(cells.owner, np.arange(1, cells.num_objects + 2))
        self._has_bumps = bool(np.abs(shapes.cubic[:, 0]).any() or np.abs(shapes.quadratic).any())
        even = np.linalg.eigvalsh(shapes.quadratic).max(axis=1, initial=0)
        odd = np.linalg.norm(shapes.cubic, axis=2).prod(axis=1)
        # No surface lies farther out, in radii of its ellipsoid, whose box is that of the rows of the inverse.
        highest = (1 + even + odd) * (1 + 1e-4)
        half = self._limit * highest[:, None] * np.linalg.norm(np.linalg.inv(shapes.axes), axis=2)
        low = np.floor((shapes.centre - half) / spacing_um - 0.5).astype(np.int64)
        high = np.ceil((shapes.centre + half) / spacing_um + 0.5).astype(np.int64)
        # The voxels that each object may touch, all of its parts together.
        self._lows, self._highs = (np.full((cells.num_objects, 3), fill, np.int64) for fill in (1 << 60, -(1 << 60)))
        np.minimum.at(self._lows, cells.owner - 1, low)
        np.maximum.at(self._highs, cells.owner - 1, high)
        round_form = np.einsum("gki,gkj->gij", shapes.axes, shapes.axes)
        even_form = np.einsum("gki,gkl,glj->gij", shapes.axes, shapes.quadratic, shapes.axes)
        self._round = round_form.astype(np.float32)
        self._even = (round_form + even_form).astype(np.float32)
        self._odd = np.einsum("gik,gkj->gij", shapes.cubic, shapes.axes).astype(np.float32)

    def paint(self, start: Array, stop: Array) -> Painted:
        """Paint the voxels from `start` to before `stop`, (z, y, x); `start` may be negative."""
        size = tuple(int(n) for n in stop - start)
        painted = Painted(
            nearest_object=np.zeros(size, np.int32),
            nearest=np.full(size, FAR, np.float32),
            runner_up=np.full(size, FAR, np.float32),
        )
        for number, low, high in self._boxes(start, stop):
            self._add(painted, number, low, high, start)
        # Beyond the limit lies what a box happened to hold.
        far = painted.nearest >= self._limit
        painted.nearest[far] = FAR
        painted.nearest_object[far] = 0
        painted.runner_up[painted.runner_up >= self._limit] = FAR
        np.minimum(painted.runner_up, painted.nearest + np.float32(self._gap), out=painted.runner_up)
        return painted

    def _boxes(self, start: Array, stop: Array) -> Iterator[tuple[int, Array, Array]]:
        """Numbers of objects that a region may show, and the voxels of it that each may touch."""
        touches = ((self._highs > start) & (self._lows < stop)).all(axis=1)
        for index in np.flatnonzero(touches).tolist():
            yield index + 1, np.maximum(self._lows[index], start), np.minimum(self._highs[index], stop)

    def _add(self, painted: Painted, number: int, low: Array, high: Array, start: Array) -> None:
        """Paint an object from the voxel `low` to before `high`; `start` is the region's first voxel."""
        planes = max(1, _SLAB_VOXELS // int(np.prod(high[1:] - low[1:])))
        for z in range(int(low[0]), int(high[0]), planes):
            first, last = np.array([z, *low[1:]]), np.array([min(z + planes, int(high[0])), *high[1:]])
            box = _box(first - start, last - start)
            here, nearest, second = painted.nearest_object[box], painted.nearest[box], painted.runner_up[box]
            distance = self._distance(number, first, last)
            wins = distance < nearest
            np.minimum(second, np.maximum(nearest, distance), out=second)
            np.minimum(nearest, distance, out=nearest)
            np.copyto(here, np.int32(number), where=wins)

    def _parts(self, number: int) -> range:
        return range(int(self._first_part[number - 1]), int(self._first_part[number]))

    def _places(self, part: int, low: Array, high: Array) -> list[Array]:
        """Places of voxels along (z, y, x) from the centre of a part, micrometres, float32."""
        middles = self._cells.shapes.centre[part]
        return [
            ((np.arange(a, b) + 0.5) * step - middle).astype(np.float32)
            for a, b, step, middle in zip(low, high, self._spacing, middles, strict=True)
        ]

    def _distance(self, number: int, low: Array, high: Array) -> Array:
        """Relative distance of some voxels to the surface of an object, that of its nearest part."""
        found: Array | None = None
        for part in self._parts(number):
            places = self._places(part, low, high)
            square = _quadratic(places, self._round[part])
            own = np.sqrt(square)
            if self._has_bumps:
                odd = _linear(places, self._odd[part, 0])
                odd *= _linear(places, self._odd[part, 1])
                odd *= _linear(places, self._odd[part, 2])
                own *= _quadratic(places, self._even[part])
                own += odd
                square *= square
                own = np.divide(square, own, out=own)
            found = own if found is None else np.minimum(found, own)
        assert found is not None
        return found


def _quadratic(places: list[Array], form: Array) -> Array:
    """A quadratic form of places along (z, y, x), and a little more so that none is 0; float32 [d, h, w]."""
    z, y, x = places
    plane = form[0, 0] * (z * z)[:, None] + (2 * form[0, 1]) * z[:, None] * y + form[1, 1] * (y * y) + _LITTLE
    slope = (2 * form[0, 2]) * z[:, None] + (2 * form[1, 2]) * y
    result: Array = slope[:, :, None] * x
    result += plane[:, :, None]
    result += form[2, 2] * (x * x)
    return result


def _linear(places: list[Array], form: Array) -> Array:
    """A linear form of places along (z, y, x); float32 [d, h, w]."""
    z, y, x = places
    result: Array = (form[0] * z[:, None] + form[1] * y)[:, :, None] + form[2] * x
    return result


def _box(place: Array, stop: Array) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in zip(place.tolist(), stop.tolist(), strict=True))
