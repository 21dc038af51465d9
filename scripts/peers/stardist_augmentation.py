"""What StarDist's 3D example does to its patches: flips and turns in the plane, another contrast and brightness.

It must not know more than numpy: StarDist's environment has nothing of this package's.
"""

import numpy as np

from peers.exchange import Array

RANGES = ((0.6, 2.0), (-0.2, 0.2))
"""Of the factor and of what is added."""


def augmented(image: Array, labels: Array) -> tuple[Array, Array]:
    """One of the eight ways to lay a square plane, four of an oblong one, then the intensity.

    Draws come from numpy's global state, as all of StarDist's: its `seed` makes them repeat.

    Args:
        image: normalised [Z, Y, X].
        labels: [Z, Y, X].
    """
    draws = np.random.rand(4)  # noqa: NPY002
    turns = int(4 * draws[0])
    if image.shape[1] != image.shape[2]:
        turns = 2 * (turns % 2)
    image, labels = (np.rot90(array, turns, axes=(1, 2)) for array in (image, labels))
    if draws[1] < 0.5:
        image, labels = image[:, ::-1], labels[:, ::-1]
    contrast, brightness = (low + draw * (high - low) for draw, (low, high) in zip(draws[2:], RANGES, strict=True))
    return image * contrast + brightness, labels
