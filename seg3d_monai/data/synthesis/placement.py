"""Objects of a synthetic scene: their shapes, and where they lie without pressing too far into each other.

Objects are drawn in rounds for the whole volume, each round as arrays: a candidate that lies too close to an object
that is there, or to one of its own round with a lower number, is given up. This is random sequential adsorption.

It must not know voxels, light or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import exp, pi
from typing import Self

import numpy as np
from scipy.spatial import cKDTree

from seg3d_monai.data.synthesis.scene import FAMILIES, Objects

MAX_ROUNDS = 60
_FEW = 0.01  # share of a round's candidates that must find a place, in two of three rounds, for another round
Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """G deformed ellipsoids, as arrays.

    centre: float64 [G, 3], micrometres.
    axes: float64 [G, 3, 3], maps a displacement in micrometres to the unit ball.
    quadratic: float64 [G, 3, 3], symmetric: even bumps.
    cubic: float64 [G, 3, 3], three directions whose product gives odd bumps.
    reach_um: float64 [G], no point is farther from the centre.
    family: int64 [G], of `FAMILIES`.
    """

    centre: Array
    axes: Array
    quadratic: Array
    cubic: Array
    reach_um: Array
    family: Array

    def __len__(self) -> int:
        return len(self.centre)

    def __getitem__(self, which: Array | slice) -> Self:
        """Some of them, by numbers, by a mask or by a slice."""
        return type(self)(**{each.name: getattr(self, each.name)[which] for each in fields(self)})

    @classmethod
    def joined(cls, parts: Sequence[Shapes]) -> Shapes:
        """Several together, in order."""
        return cls(**{each.name: np.concatenate([getattr(p, each.name) for p in parts]) for each in fields(cls)})

    def radius(self, direction: Array, which: Array | slice = slice(None)) -> Array:
        """Distances of undeformed surfaces, of some, from the centres along unit vectors [K, 3]; micrometres [K]."""
        return 1 / np.linalg.norm(np.einsum("gij,gj->gi", self.axes[which], direction), axis=1)


def draw_shapes(rng: np.random.Generator, number: int, objects: Objects) -> Shapes:
    """Draw shapes around the origin."""
    weights = np.array([getattr(objects, name) for name in FAMILIES])
    family = rng.choice(len(FAMILIES), size=number, p=weights / weights.sum())
    spread = objects.spread
    radius = objects.diameter_um / 2 * np.exp(spread * rng.standard_normal(number) - spread**2 / 2)
    logs = rng.uniform(-0.5, 0.5, (number, 3)) * np.log(objects.axis_ratio)
    logs -= logs.mean(axis=1, keepdims=True)
    is_long = (family == FAMILIES.index("elongated")) | (family == FAMILIES.index("dividing"))
    ratio = np.log(rng.uniform((1 + objects.elongation) / 2, objects.elongation, number))
    logs[is_long] += ratio[is_long, None] * np.array([2 / 3, -1 / 3, -1 / 3])
    radii = radius[:, None] * np.exp(logs)
    rotation = np.linalg.qr(rng.standard_normal((number, 3, 3)))[0]
    quadratic = rng.standard_normal((number, 3, 3))
    quadratic = quadratic + quadratic.transpose(0, 2, 1)
    largest = np.abs(np.linalg.eigvalsh(quadratic)).max(axis=1, initial=1e-9)
    quadratic *= (objects.deformation / largest)[:, None, None]
    cubic = rng.standard_normal((number, 3, 3))
    cubic /= np.linalg.norm(cubic, axis=2, keepdims=True)
    cubic[:, 0] *= objects.deformation
    return Shapes(
        centre=np.zeros((number, 3)),
        axes=rotation / radii[:, :, None],
        quadratic=quadratic,
        cubic=cubic,
        reach_um=radii.max(axis=1, initial=0) * (1 + 2 * objects.deformation),
        family=family,
    )


def wanted_number(extent_um: Array, objects: Objects) -> int:
    """How many objects fill a box of (z, y, x) micrometres, and a rim of a radius around it, as was asked for."""
    around = float(np.prod(extent_um + objects.diameter_um))
    volume = pi / 6 * objects.diameter_um**3 * exp(3 * objects.spread**2)  # the mean of the cube of the radius
    return round(objects.fill * around / volume)


def place_shapes(rng: np.random.Generator, extent_um: Array, objects: Objects) -> Shapes:
    """Place objects in a box and a rim of a radius around it.

    Args:
        rng: of all draws.
        extent_um: (z, y, x) of the box, which begins at the origin.
        objects: how many, how large, how close.

    Returns:
        `wanted_number` of them, or as many as found a place.
    """
    wanted, rim = wanted_number(extent_um, objects), objects.diameter_um / 2
    placed = draw_shapes(rng, 0, objects)
    # First those that may lie anywhere, one at least, then those that are moved to one that is there.
    for attaches, enough in ((False, min(wanted, max(1, round((1 - objects.attach) * wanted)))), (True, wanted)):
        poor = 0
        for _ in range(MAX_ROUNDS):
            if len(placed) >= enough or poor == 3 or (attaches and not objects.attach):
                break
            number = 2 * (enough - len(placed)) + 8
            new = draw_shapes(rng, number, objects)
            new.centre[:] = rng.uniform(-rim, extent_um + rim, (number, 3))
            tree = cKDTree(placed.centre) if len(placed) else None
            if attaches:
                _attach(new, rng.uniform(objects.closeness, objects.closeness + 0.08, number), placed, tree)
            is_inside = np.all((new.centre >= -rim) & (new.centre <= extent_um + rim), axis=1)
            new = new[is_inside]
            if tree is not None and len(new):
                first, _ = _too_close(new, cKDTree(new.centre), placed, tree, objects.closeness)
                new = new[np.setdiff1d(np.arange(len(new)), first)]
            new = new[_lower_numbers_first(new, objects.closeness)][: enough - len(placed)]
            poor = poor + 1 if len(new) < _FEW * number else 0
            placed = Shapes.joined([placed, new])
    return placed


def _attach(new: Shapes, distance: Array, placed: Shapes, tree: cKDTree) -> None:
    """Move candidates along the line to the nearest object until they touch it.

    Args:
        new: candidates; their centres are changed.
        distance: of each between the centres, in sums of the radii.
        placed: objects, at least one.
        tree: their centres.
    """
    _, nearest = tree.query(new.centre)
    offset = new.centre - placed.centre[nearest]
    direction = offset / np.maximum(np.linalg.norm(offset, axis=1, keepdims=True), 1e-9)
    radii = placed.radius(direction, nearest) + new.radius(direction)
    new.centre[:] = placed.centre[nearest] + direction * (radii * distance)[:, None]


def _too_close(
    one: Shapes, one_tree: cKDTree, other: Shapes, other_tree: cKDTree, closeness: float
) -> tuple[Array, Array]:
    """Pairs, number in `one` and number in `other`, that lie closer than allowed; of one with itself lower first."""
    if not (len(one) and len(other)):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    farthest = closeness * float(one.reach_um.max() + other.reach_um.max())
    if one is other:  # each pair once
        first, second = one_tree.query_pairs(farthest, output_type="ndarray").T
        apart = np.linalg.norm(one.centre[first] - one.centre[second], axis=1)
    else:
        near = one_tree.sparse_distance_matrix(other_tree, farthest, output_type="ndarray")
        first, second, apart = near["i"], near["j"], near["v"]
    may = (apart > 0) & (apart < closeness * (one.reach_um[first] + other.reach_um[second]))
    first, second, apart = first[may], second[may], apart[may]
    direction = (other.centre[second] - one.centre[first]) / apart[:, None]
    radii = one.radius(direction, first) + other.radius(direction, second)
    close = apart < closeness * radii
    return first[close], second[close]


def _lower_numbers_first(new: Shapes, closeness: float) -> Array:
    """A mask of those that stay when one after another takes its place."""
    stays = np.ones(len(new), bool)
    if len(new) > 1:
        tree = cKDTree(new.centre)
        first, second = _too_close(new, tree, new, tree, closeness)
        for i, j in sorted(zip(second.tolist(), first.tolist(), strict=True)):
            if stays[j]:
                stays[i] = False
    return stays
