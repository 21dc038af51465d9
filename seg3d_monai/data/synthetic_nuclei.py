"""Crowded nuclei for the synthetic specimen: where they are, how they are shaped, which voxel is whose.

Nuclei are smoothly deformed ellipsoids, placed one at a time and often against one that is already there. A voxel that
two of them claim goes to the one whose surface is relatively farther away, so no two overlap.

It must not know light, cameras or files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

MIN_VISIBLE_VOXELS = 25
PAINTED_REACH = 1.35
"""Distances are painted so far, in the reach of a nucleus: the seam and the rim stain need them beyond the surface."""

Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class NucleiModel:
    """How nuclei look and crowd. Lengths in micrometres.

    Args:
        density: nuclei per cubic micrometre of volume, > 0.
        diameter_um: smallest and largest mean diameter of a nucleus.
        attach_prob: probability that a nucleus is placed against one that is already there, in [0, 1].
        elongation: largest relative difference of an axis from the mean radius, in [0, 0.5].
        deformation: amplitude of the smooth bumps relative to the radius, in [0, 0.3].
        brightness_spread: standard deviation of the log of the brightness, >= 0.
        texture: standard deviation of the chromatin texture relative to the brightness, >= 0.
    """

    density: float = 7.4e-5
    diameter_um: tuple[float, float] = (10.0, 14.0)
    attach_prob: float = 0.70
    elongation: float = 0.22
    deformation: float = 0.10
    brightness_spread: float = 0.42
    texture: float = 0.25


@dataclass(frozen=True)
class Nucleus:
    """A deformed ball of one brightness and kind."""

    centre: Array  # um, [3]
    axes: Array  # [3, 3]: maps a displacement in um to the unit ball
    reach: float  # um, no point of the nucleus is farther from its centre
    quadratic: Array  # [3, 3] symmetric: even bumps
    cubic: Array  # [3, 3]: three directions whose product gives odd bumps
    brightness: float
    kind: int

    def radius(self, direction: Array) -> float:
        """Distance (um) of the undeformed surface from the centre along a unit vector."""
        return 1.0 / float(np.linalg.norm(self.axes @ direction))


def place_nuclei(rng: np.random.Generator, extent_um: Array, model: NucleiModel, num_classes: int) -> list[Nucleus]:
    """Place nuclei one after another; a place that would press too far into a neighbour is given up."""
    wanted = max(1, round(model.density * float(np.prod(extent_um))))
    placed: list[Nucleus] = []
    centres = np.empty((wanted, 3))
    reaches = np.empty(wanted)
    # Neighbours are looked for in cells that are longer than any two nuclei reach together.
    cell_um = 2 * 1.2 * model.diameter_um[1] / 2 * (1 + model.elongation) * (1 + 2 * model.deformation)
    cells: dict[tuple[int, ...], list[int]] = {}
    for _ in range(wanted):
        candidate = _draw_nucleus(rng, model, num_classes)
        for _attempt in range(60):
            if placed and rng.random() < model.attach_prob:
                parent = placed[int(rng.integers(len(placed)))]
                direction = rng.normal(size=3)
                direction /= np.linalg.norm(direction)
                distance = (parent.radius(direction) + candidate.radius(direction)) * rng.uniform(0.90, 0.98)
                centre = parent.centre + direction * distance
            else:
                centre = rng.uniform(-3.0, extent_um + 3.0)
            if np.any(centre < -3.0) or np.any(centre > extent_um + 3.0):
                continue
            cell = tuple(int(n) for n in np.floor(centre / cell_um))
            around = product(*((n - 1, n, n + 1) for n in cell))
            near = np.array(sorted(i for other in around for i in cells.get(other, ())), np.int64)
            offsets = centres[near] - centre
            distances = np.linalg.norm(offsets, axis=1)
            close = distances < reaches[near] + candidate.reach
            if all(
                distance >= 0.88 * (placed[i].radius(offset / distance) + candidate.radius(offset / distance))
                for i, offset, distance in zip(near[close], offsets[close], distances[close], strict=True)
            ):
                count = len(placed)
                centres[count] = centre
                reaches[count] = candidate.reach
                cells.setdefault(cell, []).append(count)
                placed.append(replace(candidate, centre=centre))
                break
    return placed


def _draw_nucleus(rng: np.random.Generator, model: NucleiModel, num_classes: int) -> Nucleus:
    low, high = model.diameter_um
    kind = int(rng.random() < 0.4) if num_classes == 2 else 0
    radius = rng.uniform(low, high) / 2
    brightness = float(np.exp(rng.normal(0.0, model.brightness_spread)))
    if num_classes == 2:
        radius *= 0.85 if kind else 1.15
        brightness = (1.9 if kind else 0.8) * brightness**0.4
    radii = radius * (1 + rng.uniform(-model.elongation, model.elongation, size=3))
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    quadratic = rng.normal(size=(3, 3))
    quadratic = (quadratic + quadratic.T) / 2
    quadratic *= model.deformation / max(float(np.abs(np.linalg.eigvalsh(quadratic)).max()), 1e-9)
    cubic = rng.normal(size=(3, 3))
    cubic /= np.linalg.norm(cubic, axis=1, keepdims=True)
    cubic[0] *= model.deformation
    reach = float(radii.max()) * (1 + 2 * model.deformation)
    return Nucleus(np.zeros(3), rotation / radii[:, None], reach, quadratic, cubic, brightness, kind)


def paint_nuclei(
    placed: list[Nucleus], shape: tuple[int, int, int], spacing: Array
) -> tuple[Array, Array, Array, list[Nucleus]]:
    """Give each voxel to one nucleus.

    Returns:
        labels uint32, relative distance (1 on a surface) to the nearest and the second nearest nucleus, and the
        nuclei that are visible, in the order of their ids.
    """
    owner, nearest, runner_up = paint_planes(enumerate(placed, start=1), shape, spacing, (0, shape[0]))
    new_id = visible_ids(np.bincount(owner.ravel(), minlength=len(placed) + 1))
    kept = [nucleus for nucleus, number in zip(placed, new_id[1:], strict=True) if number]
    return new_id[owner], nearest, runner_up, kept


def visible_ids(voxels: Array) -> Array:
    """Ids, compact from 1, of the nuclei that have enough voxels; 0 for the others and for the background.

    Args:
        voxels: [G + 1], of the background and of each nucleus.

    Returns:
        uint32 [G + 1].
    """
    visible = voxels >= MIN_VISIBLE_VOXELS
    visible[0] = False
    new_id = np.zeros(len(voxels), dtype=np.uint32)
    new_id[visible] = np.arange(1, int(visible.sum()) + 1, dtype=np.uint32)
    return new_id


def planes_of(nucleus: Nucleus, spacing: Array) -> tuple[int, int]:
    """First and one past the last plane that painting a nucleus may touch, in a volume without end."""
    reach = PAINTED_REACH * nucleus.reach
    low = np.floor((nucleus.centre[0] - reach) / spacing[0] - 0.5)
    return int(low), int(np.ceil((nucleus.centre[0] + reach) / spacing[0] + 0.5))


def paint_planes(
    numbered: Iterable[tuple[int, Nucleus]], shape: tuple[int, int, int], spacing: Array, planes: tuple[int, int]
) -> tuple[Array, Array, Array]:
    """Paint some planes of a volume; what comes out for a plane does not depend on the others.

    Args:
        numbered: numbers from 1, ascending, and nuclei: all that touch the planes, at least.
        shape: (z, y, x) of the volume.
        spacing: (z, y, x) micrometres per voxel.
        planes: the first, and one past the last.

    Returns:
        Each [planes, Y, X]: the number of the nucleus that a voxel belongs to (uint32, 0 for none), and the relative
        distance (1 on a surface) to the nearest and the second nearest nucleus.
    """
    first_plane, stop_plane = planes
    size = (stop_plane - first_plane, *shape[1:])
    owner = np.zeros(size, dtype=np.uint32)
    nearest = np.full(size, 3.0, dtype=np.float32)
    runner_up = np.full(size, 3.0, dtype=np.float32)
    for index, nucleus in numbered:
        reach = PAINTED_REACH * nucleus.reach
        low = np.maximum(np.floor((nucleus.centre - reach) / spacing - 0.5), (first_plane, 0, 0)).astype(int)
        high = np.minimum(np.ceil((nucleus.centre + reach) / spacing + 0.5), (stop_plane, *shape[1:])).astype(int)
        if np.any(high <= low):
            continue
        box = tuple(slice(a - start, b - start) for a, b, start in zip(low, high, (first_plane, 0, 0), strict=True))
        grids = [
            ((np.arange(a, b) + 0.5) * step - middle).astype(np.float32)
            for a, b, step, middle in zip(low, high, spacing, nucleus.centre, strict=True)
        ]
        z, y, x = np.meshgrid(*grids, indexing="ij", sparse=True)
        axes = nucleus.axes.astype(np.float32)
        u, v, w = (row[0] * z + row[1] * y + row[2] * x for row in axes)
        norm = np.sqrt(u * u + v * v + w * w) + np.float32(1e-6)
        u, v, w = u / norm, v / norm, w / norm
        q = nucleus.quadratic.astype(np.float32)
        bump = q[0, 0] * u * u + q[1, 1] * v * v + q[2, 2] * w * w
        bump += 2 * (q[0, 1] * u * v + q[0, 2] * u * w + q[1, 2] * v * w)
        odd = np.ones_like(norm)
        for row in nucleus.cubic.astype(np.float32):
            odd = odd * (row[0] * u + row[1] * v + row[2] * w)
        distance = norm / (1 + bump + odd)
        first, second = nearest[box], runner_up[box]
        wins = distance < first
        runner_up[box] = np.where(wins, first, np.minimum(second, distance))
        nearest[box] = np.where(wins, distance, first)
        box_owner = owner[box]
        box_owner[wins & (distance < 1)] = index
        box_owner[wins & (distance >= 1)] = 0
    return owner, nearest, runner_up
