"""Stacks on disk, written piece by piece, and a cheap predictor that finds the objects in them."""

import time
from itertools import product
from pathlib import Path

import numpy as np
import zarr
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from bench.inference.tissue import Roi, to_instances
from seg3d_monai.inference import Instances

Triple = tuple[int, int, int]

BACKGROUND, FOREGROUND = 400, 2000
THRESHOLD = (BACKGROUND + FOREGROUND) / 2
SPACING_UM = (2.0, 0.8, 0.8)


def write_tiled(path: Path, tile: NDArray[np.uint16], shape: Triple, chunks: Triple) -> Path:
    """Write a stack that repeats a tile, one tile at a time; a stack of any size takes the memory of a few tiles.

    Args:
        path: of the Zarr array to write.
        tile: [d, h, w]; what reaches beyond the stack is cut off.
        shape: (Z, Y, X) of the stack.
        chunks: (z, y, x) of its chunks, dividers of the tile's extents.
    """
    names = ["z", "y", "x"]
    array = zarr.create_array(path, shape=shape, dtype=tile.dtype, chunks=chunks, dimension_names=names)
    starts = (range(0, extent, step) for extent, step in zip(shape, tile.shape, strict=True))
    for corner in product(*starts):
        window = tuple(slice(a, min(a + n, s)) for a, n, s in zip(corner, tile.shape, shape, strict=True))
        array[window] = tile[tuple(slice(0, part.stop - part.start) for part in window)]
    return path


def blob_tile(shape: Triple, pitch: Triple, seed: int = 0) -> NDArray[np.uint16]:
    """Bright ellipsoids on a noisy ground, one in each cell of a lattice, each at a random place in its cell.

    Args:
        shape: (z, y, x) voxels, multiples of the pitch.
        pitch: (z, y, x) of the lattice; an ellipsoid's half axes are a quarter of it.
        seed: of the places and the noise.
    """
    rng = np.random.default_rng(seed)
    tile = rng.normal(BACKGROUND, 40, shape)
    half = np.array(pitch) / 4
    for corner in product(*(range(0, n, p) for n, p in zip(shape, pitch, strict=True))):
        # A voxel of room on all sides: no two ellipsoids touch.
        centre = np.array(corner) + rng.uniform(half + 1, np.array(pitch) - half - 1)
        window = tuple(slice(c, c + p) for c, p in zip(corner, pitch, strict=True))
        grid = np.stack(np.meshgrid(*(np.arange(w.start, w.stop) + 0.5 for w in window), indexing="ij"), axis=-1)
        tile[window][(((grid - centre) / half) ** 2).sum(axis=-1) <= 1] += FOREGROUND - BACKGROUND
    return tile.astype(np.uint16)


class ThresholdPredictor:
    """Connected components above a threshold: the cheapest predictor that finds what is there.

    Args:
        pause_s: seconds that a block takes longer than it must.
    """

    def __init__(self, pause_s: float = 0.0) -> None:
        self.pause_s = pause_s

    def __call__(self, block: Tensor, roi: Roi) -> Instances:
        """The objects of a block, in the order of their first voxels, with random scores that depend on its ROI."""
        labels, _ = ndimage.label(block[0].numpy() > THRESHOLD, structure=np.ones((3, 3, 3)))
        time.sleep(self.pause_s)
        return to_instances(labels, np.random.default_rng(roi))
