"""The perfect predictor on shapes that are hard to stitch: the result must be the truth, voxel by voxel."""

import numpy as np
from numpy.typing import NDArray

from bench.inference.bars import Row
from bench.inference.errors import num_inexact
from bench.inference.options import Options
from bench.inference.tissue import Truth, image_of
from seg3d_monai.inference import predict_labels

SHAPE, BLOCK_SIZE = (60, 110, 190), (12, 22, 38)
HALOS = ((1, 1, 1), (3, 6, 9))
QUICK = {"shape": (20, 25, 30), "block_size": (4, 5, 6)}
METHOD = (
    "Exact: the perfect predictor with random scores; errors are cells without an object of exactly their voxels, and "
    "objects without such a cell."
)


def measure(options: Options) -> list[Row]:
    """One row for each shape of cells and halo: cells and objects that are not the same voxel by voxel."""
    sizes = QUICK if options.is_quick else {"shape": SHAPE, "block_size": BLOCK_SIZE}
    shape, block_size = sizes["shape"], sizes["block_size"]
    rows = []
    for name, truth in hard_shapes(shape).items():
        for halo in HALOS[: 1 if options.is_quick else None]:
            labels, _ = predict_labels(image_of(truth), Truth(truth), block_size, halo)
            row = {"cells": name, "shape": shape, "block_size": block_size, "halo": halo}
            num_cells = int(np.count_nonzero(np.bincount(truth.ravel())[1:]))
            rows.append(row | {"num_cells": num_cells, "errors": num_inexact(truth, labels)})
    return rows


def hard_shapes(shape: tuple[int, int, int]) -> dict[str, NDArray[np.int32]]:
    """Label volumes [Z, Y, X] by name: rods from face to face of the volume, and boxes closed around each other."""
    z, y, x = np.indices(shape, dtype=np.int32)
    rods = {
        "rods along z": 1 + (y // 3) * shape[2] + x // 4,
        "rods along y": 1 + (z // 2) * shape[2] + x // 3,
        "rods along x": 1 + (z // 2) * shape[1] + y // 3,
    }
    middle = [(n - 1) / 2 for n in shape]
    depth = np.max([abs(grid - c) / (c + 0.5) for grid, c in zip((z, y, x), middle, strict=True)], axis=0)
    shells = 1 + (depth * 5).astype(np.int32)
    # A lattice that is sheared along z: every rod crosses blocks along y and x too.
    oblique = 1 + ((y + z * shape[1] // shape[0]) // 5) * 2 * shape[2] + (x + z * shape[2] // shape[0]) // 7
    gapped = np.where((y % 3 > 0) & (x % 4 > 0), rods["rods along z"], 0)
    return {**rods, "oblique rods": oblique, "rods with gaps": gapped, "nested shells": shells}
