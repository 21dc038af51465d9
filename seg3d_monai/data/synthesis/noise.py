"""Random fields without an end: what lies at a place is a function of the seed and the place alone.

White noise is drawn by the tile; smooth noise is white noise on a lattice, filtered and interpolated. So a region is
the same whatever other regions were made, in whatever order.

It must not know what the noise is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import ceil, exp, prod

import numpy as np
import torch

from seg3d_monai.data.blur import filter_along

TILE = 32
"""Cells of a tile along each axis."""
_ORIGIN = 1 << 24  # seeds are not negative
_SUMMANDS = 4
_REACH = 3.0  # standard deviations of the filters
Array = np.ndarray
Places = Sequence[int] | Array


def gaussian(sigma: float) -> list[float]:
    """Weights of a Gaussian filter that sum to 1, an odd number of them.

    Args:
        sigma: standard deviation, in cells, from 0.
    """
    radius = ceil(_REACH * sigma - 0.5) if sigma > 0 else 0
    weights = [exp(-0.5 * (place / sigma) ** 2) if radius else 1.0 for place in range(-radius, radius + 1)]
    return [weight / sum(weights) for weight in weights]


def white_noise(seed: Sequence[int], start: Places, stop: Places) -> Array:
    """Independent, nearly normal numbers, float32 of extent `stop - start`.

    Each is a sum of four uniform ones (Irwin 1927, Hall 1927), none beyond 3.5 standard deviations: a third of the time
    of normal numbers, and the same on every machine.

    Args:
        seed: integers >= 0.
        start: first cell along each axis, may be negative.
        stop: one past the last.
    """
    result = np.empty([b - a for a, b in zip(start, stop, strict=True)], np.float32)
    if result.size == 0:
        return result
    tiles = [range(a // TILE, (b - 1) // TILE + 1) for a, b in zip(start, stop, strict=True)]
    for tile in product(*tiles):
        to, come = [], []
        for number, a, b in zip(tile, start, stop, strict=True):
            low, high = max(a, number * TILE), min(b, (number + 1) * TILE)
            to.append(slice(low - a, high - a))
            come.append(slice(low - number * TILE, high - number * TILE))
        result[tuple(to)] = _tile(seed, tile, tuple(come))
    return result


def smooth_noise(seed: Sequence[int], start: Places, stop: Places, sigma: Sequence[float] | Array) -> Array:
    """Normal numbers of unit variance, about as far correlated as a Gaussian filter of white noise makes them.

    Args:
        seed: integers >= 0.
        start: first voxel along each axis, may be negative.
        stop: one past the last.
        sigma: standard deviation of the filter along each axis, voxels.

    Returns:
        float32 of extent `stop - start`.
    """
    steps = [max(1, int(s)) for s in sigma]
    kernels = [gaussian(s / step) for s, step in zip(sigma, steps, strict=True)]
    first = [a // step for a, step in zip(start, steps, strict=True)]
    last = [(b - 1) // step + 2 for b, step in zip(stop, steps, strict=True)]
    result = _filtered(seed, first, last, kernels)
    # The last axis first, while the others are short: places side by side in memory are the slowest to pick from.
    for axis in reversed(range(result.ndim)):
        a, b, step, low = int(start[axis]), int(stop[axis]), steps[axis], first[axis]
        if step == 1:
            result = result[(slice(None),) * axis + (slice(a - low, b - low),)]
        else:
            result = between(result, axis, np.arange(a, b) / step, low)
    return result


def filtered_noise(seed: Sequence[int], start: Places, stop: Places, sigma: Sequence[float] | Array) -> Array:
    """Normal numbers of unit variance: white noise through a Gaussian filter, at every voxel; float32.

    Args:
        seed: integers >= 0.
        start: first voxel along each axis, may be negative.
        stop: one past the last.
        sigma: standard deviation of the filter along each axis, voxels.
    """
    return _filtered(seed, [int(a) for a in start], [int(b) for b in stop], [gaussian(s) for s in sigma])


def variation_of_sums(sigma: Sequence[float] | Array) -> float:
    """How much more a sum over many voxels of `filtered_noise` varies than one of white noise.

    Args:
        sigma: standard deviation of the filter along each axis, voxels.
    """
    return prod(sum(kernel) / sum(w * w for w in kernel) ** 0.5 for kernel in map(gaussian, sigma))


def _filtered(seed: Sequence[int], first: Sequence[int], last: Sequence[int], kernels: Sequence[list[float]]) -> Array:
    """White noise from `first` to before `last` through kernels, scaled to unit variance."""
    radii = [len(kernel) // 2 for kernel in kernels]
    field = torch.from_numpy(
        white_noise(
            seed, [a - r for a, r in zip(first, radii, strict=True)], [b + r for b, r in zip(last, radii, strict=True)]
        )
    )
    for axis, (kernel, radius) in enumerate(zip(kernels, radii, strict=True)):
        field = filter_along(field, kernel, axis).narrow(axis, radius, field.shape[axis] - 2 * radius)
    result: Array = (field / prod(sum(w * w for w in kernel) for kernel in kernels) ** 0.5).numpy()
    return result


def between(array: Array, axis: int, places: Array, first: int) -> Array:
    """Linear interpolation along an axis.

    Args:
        array: values at whole places, from `first` on to one past the last that is asked for.
        axis: the axis.
        places: float64 [P].
        first: place of the first value.
    """
    low = np.floor(places)
    weight = (places - low).astype(np.float32)  # before `first` is taken off, so that it does not depend on it
    number = low.astype(np.int64) - first
    if not weight.any():
        return np.take(array, number, axis=axis)
    weight = weight.reshape([-1 if a == axis else 1 for a in range(array.ndim)])
    after = np.minimum(number + 1, array.shape[axis] - 1)
    result: Array = np.take(array, number, axis=axis)
    result *= 1 - weight
    further = np.take(array, after, axis=axis)
    further *= weight
    result += further
    return result


def _tile(seed: Sequence[int], tile: Sequence[int], cells: tuple[slice, ...]) -> Array:
    """Some cells of a tile; all are drawn, as the generator knows no places."""
    generator = np.random.SFC64((*seed, *(number + _ORIGIN for number in tile)))
    numbers = generator.random_raw(TILE ** len(tile))
    parts = numbers.view(np.int16).reshape([_SUMMANDS] + [TILE] * len(tile))
    total: Array = parts[0][cells].astype(np.float32)
    for part in parts[1:]:
        total += part[cells]
    total *= np.float32(_SUMMANDS * (2.0**32 - 1) / 12) ** np.float32(-0.5)
    return total
