"""Shape and intensity of objects from the sums over their voxels (object_sums.py).

Surface areas follow Crofton's formula on the 13 directions to the neighbours of a voxel, each weighted by its Voronoi
cell on the sphere of directions (Legland, Kiêu and Devaux, Image Analysis & Stereology 26, 2007). The directions take
the voxel size into account, and the formula needs nothing but pairs of neighbours, which do not mind block faces.

The docstring of `measure_objects` defines the columns. This file must not know volumes or blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import SphericalVoronoi

from seg3d_monai.inference.object_sums import AXIS_PAIRS, STEP_KINDS, Integers, ObjectSums

_FLAT = 1e-12  # principal variances that are smaller, relative to the largest, are rounding errors

Floats = NDArray[np.float64]


def shape_columns(objects: ObjectSums, spacing_um: Sequence[float] | None) -> dict[str, NDArray]:
    """Columns of volume, surface and axes, [N] each; those in micrometre are null where the voxel size is unknown."""
    spacing = np.asarray((1.0, 1.0, 1.0) if spacing_um is None else spacing_um)
    volume = objects.voxels * spacing.prod()
    diameter = np.cbrt(6 / np.pi * volume)
    surface = _surface_area(objects, spacing)
    lengths = _axis_lengths(objects, spacing)
    major, intermediate, minor = lengths.T
    columns = {
        "volume_um3": volume,
        "equivalent_diameter_um": diameter,
        "surface_area_um2": surface,
        "sphericity": np.pi * diameter**2 / surface,
        "axis_major_length_um": major,
        "axis_intermediate_length_um": intermediate,
        "axis_minor_length_um": minor,
        "elongation": np.divide(major, intermediate, out=np.full_like(major, np.nan), where=intermediate > 0),
    }
    known = np.nan if spacing_um is None else 1.0
    return {"volume_voxels": objects.voxels} | {name: values * known for name, values in columns.items()}


def _surface_area(objects: ObjectSums, spacing: Floats) -> Floats:
    """Twice the mean, over all directions, of the area of a projection times how often its lines cross the surface."""
    steps = np.array([step for step in product((-1, 0, 1), repeat=3) if any(step)])
    lengths = np.linalg.norm(steps * spacing, axis=1)
    shares = SphericalVoronoi(steps * spacing / lengths[:, None]).calculate_areas() / (4 * np.pi)
    surface = np.zeros(len(objects.ids))
    for kind, same in zip(STEP_KINDS, objects.neighbours.T, strict=True):
        of_kind = (np.abs(steps) == kind).all(axis=1)
        # Each line of voxels stands for voxel volume / step of the plane across it; a voxel whose neighbour is not of
        # its object is a crossing. Steps and their opposites are the same lines, met from either end.
        crossings = of_kind.sum() * objects.voxels - 2 * same
        surface += 2 * shares[of_kind].mean() * 2 * crossings * spacing.prod() / lengths[of_kind].mean()
    return surface


def _axis_lengths(objects: ObjectSums, spacing: Floats) -> Floats:
    """[N, 3], descending; a solid ellipsoid of full axis L has the variance L**2 / 20 along it."""
    covariance = np.zeros((len(objects.ids), 3, 3))
    for (a, b), products in zip(AXIS_PAIRS, objects.second.T, strict=True):
        central = _central_products(objects.voxels, objects.first[:, a], objects.first[:, b], products)
        covariance[:, a, b] = covariance[:, b, a] = central / objects.voxels * spacing[a] * spacing[b]
    variances = np.linalg.eigvalsh(covariance)[:, ::-1]
    variances = np.where(variances > _FLAT * variances[:, :1], variances, 0)
    return np.sqrt(20 * variances)


def _central_products(count: Integers, sum_a: Integers, sum_b: Integers, products: Integers) -> Floats:
    """Sums of (a - mean a) * (b - mean b) from sums of a, b and a * b.

    They are shifted to the integers below the means first. That is exact even where `products` has gone round 2**64,
    since the shifted sum is small.
    """
    low_a, low_b = sum_a // count, sum_b // count
    shifted = products - low_a * sum_b - low_b * sum_a + count * low_a * low_b
    return shifted - (sum_a - count * low_a).astype(np.float64) * (sum_b - count * low_b) / count


def intensity_columns(objects: ObjectSums, channels: Sequence[int]) -> dict[str, NDArray]:
    """Columns of intensity, [N] each, of channels that are numbered so."""
    columns: dict[str, NDArray] = {}
    for channel, total, squares, lowest, highest in zip(
        channels, objects.total.T, objects.squares.T, objects.lowest.T, objects.highest.T, strict=True
    ):
        if total.dtype.kind == "i":
            squares = _central_products(objects.voxels, total, total, squares)
        columns |= {
            f"intensity_mean_c{channel}": total / objects.voxels,
            f"intensity_std_c{channel}": np.sqrt(squares / objects.voxels),
            f"intensity_min_c{channel}": lowest,
            f"intensity_max_c{channel}": highest,
            f"intensity_sum_c{channel}": total,
        }
    return columns
