"""Rules of a plan for prediction by blocks: how far a block looks beyond what it owns, and how large it is.

A rule is a pure function of measurements. It returns a value and the reason in words.
Must not know: bundles, files, torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, prod

import numpy as np

from seg3d_monai.planning.wording import by, memory_text, number

Triple = tuple[int, int, int]

MOST_OVERHEAD = 2.5
"""Voxels that a block reads for each that it owns; a block that needs fewer is large enough."""


def halo(large: Sequence[float], strides: Sequence[int]) -> tuple[Triple, str]:
    """Voxels that a block reads beyond what it owns, (z, y, x).

    Args:
        large: (z, y, x) extent of the large objects, voxels.
        strides: of the coarsest level.
    """
    z, y, x = (step * max(1, ceil(extent / step)) for extent, step in zip(large, strides, strict=True))
    return (z, y, x), (
        f"a large object ({by(large)}), so that each block that owns a part of one sees all of it; longer ones, up to "
        "twice as long, are seen whole by one block. Multiples of the coarsest stride: cells of neighbours coincide"
    )


def block_size(
    halo: Sequence[int],
    crop: Sequence[int],
    strides: Sequence[int],
    fits: Callable[[Triple], bool],
    takes: Callable[[Triple], float],
    limit: str,
) -> tuple[Triple, str]:
    """Voxels that a block owns, (z, y, x).

    Args:
        halo: of the blocks.
        crop: of the training: a block reads no less, if that fits.
        strides: of the coarsest level; blocks are multiples.
        fits: whether a block may read so many voxels along each axis.
        takes: bytes that a block of so many voxels takes.
        limit: in words, where it does not fit.
    """
    steps, beyond = np.array(strides), 2 * np.array(halo)
    owned = np.maximum(1, np.ceil((np.array(crop) - beyond) / steps)).astype(int) * steps
    while not fits(_triple(owned + beyond)) and (owned > steps).any():
        axis = int(np.argmax(owned / steps))
        owned[axis] -= steps[axis]
    while overhead(owned, halo) > MOST_OVERHEAD:
        order = np.argsort(-beyond / owned, kind="stable")
        larger = (owned + steps * (np.arange(3) == axis) for axis in order)
        grown = next((size for size in larger if fits(_triple(size + beyond))), None)
        if grown is None:
            break
        owned = grown
    return _triple(owned), (
        f"large enough that a block reads {number(MOST_OVERHEAD)} voxels for each that it owns, or until {limit}; "
        f"this one reads {number(overhead(owned, halo))} and takes {memory_text(takes(_triple(owned + beyond)))}"
    )


def overhead(owned: Sequence[int], halo: Sequence[int]) -> float:
    """Voxels that a block reads for each that it owns."""
    return float(prod(1 + 2 * h / n for n, h in zip(owned, halo, strict=True)))


def _triple(size: np.ndarray) -> Triple:
    z, y, x = (int(n) for n in size)
    return z, y, x
