"""Errors at seams: dense tissue, seen a little differently by every block, and the perfect predictor on hard shapes."""

import sys
import time
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.inference.bars import Row
from bench.inference.errors import cell_errors, num_inexact
from bench.inference.tissue import DisplacedTissue, Truth, tissue_seeds, voronoi
from seg3d_monai.data.volume import ArrayVolume
from seg3d_monai.inference import predict_labels

SHAPE, BLOCK_SIZE, HALO = (256, 256, 256), (128, 128, 128), (32, 32, 32)
DIAMETERS, SIGMAS, NUM_TISSUES = (12, 20, 30), (0.0, 1.0, 2.0), 3
QUICK: dict[str, Any] = {"shape": (48, 56, 64), "block_size": (24, 28, 32), "halo": (10, 10, 10), "num_tissues": 1}
QUICK_DIAMETERS, QUICK_SIGMAS = (9,), (0.0, 1.0)
METHOD = (
    "Seams: Voronoi cells of a jittered lattice that is turned and shifted at random; a predictor that returns the "
    "cells of the block's ROI, exactly, with random scores, but of seeds displaced by normal draws of the block's own. "
    "Cells are counted as split, merged or lost by the rule in scripts/bench/inference/errors.py, at seams and away "
    "from them; excess is the share of wrong cells at seams less that away from seams."
)


def measure_seams(is_quick: bool) -> list[Row]:
    """One row for each diameter and displacement, all tissues together."""
    sizes = QUICK if is_quick else {"shape": SHAPE, "block_size": BLOCK_SIZE, "halo": HALO, "num_tissues": NUM_TISSUES}
    diameters, sigmas = (QUICK_DIAMETERS, QUICK_SIGMAS) if is_quick else (DIAMETERS, SIGMAS)
    return [measure_tissue(diameter, sigma, **sizes) for diameter in diameters for sigma in sigmas]


def measure_tissue(
    diameter: float,
    sigma: float,
    *,
    shape: tuple[int, int, int],
    block_size: tuple[int, int, int],
    halo: tuple[int, int, int],
    num_tissues: int,
) -> Row:
    """Errors of one diameter and displacement.

    Args:
        diameter: of a cell, voxels.
        sigma: of a seed's displacement along each axis, voxels.
        shape: (Z, Y, X) of the volume.
        block_size: (z, y, x) that a block owns.
        halo: (z, y, x) that it reads beyond.
        num_tissues: how many tissues are counted together.
    """
    totals: dict[str, Counter[str]] = {"seam": Counter(), "away": Counter()}
    num_objects, start = 0, time.perf_counter()
    for seed in range(num_tissues):
        seeds = tissue_seeds(shape, diameter, seed)
        truth = voronoi(seeds, (0, 0, 0, *shape))
        labels, table = predict_labels(image_of(truth), DisplacedTissue(seeds, sigma, seed), block_size, halo)
        num_objects += len(table)
        for place, counts in cell_errors(truth, labels, block_size).counts().items():
            totals[place].update(counts)
    seam, away = ({**totals[place]} for place in ("seam", "away"))
    rates = [counts["wrong"] / max(counts["cells"], 1) for counts in (seam, away)]
    row: Row = {"diameter": diameter, "sigma": sigma, "shape": shape, "block_size": block_size, "halo": halo}
    row |= {"tissues": num_tissues, "objects": num_objects, "seam": seam, "away": away, "excess": rates[0] - rates[1]}
    row["seconds"] = time.perf_counter() - start
    print(f"diameter {diameter:g} sigma {sigma:g}: {seam} at seams, {away} away", file=sys.stderr, flush=True)
    return row


def image_of(truth: NDArray[np.integer]) -> ArrayVolume:
    """An image without constant blocks, which a run may take for empty; the predictors here do not look at it."""
    ramp = np.arange(truth.shape[2], dtype=np.uint8)
    return ArrayVolume(np.broadcast_to(ramp, truth.shape), (2.0, 1.0, 0.5))


EXACT_SHAPE, EXACT_BLOCK_SIZE = (60, 110, 190), (12, 22, 38)
EXACT_HALOS = ((1, 1, 1), (3, 6, 9))
QUICK_EXACT = {"shape": (20, 25, 30), "block_size": (4, 5, 6)}


def measure_exact(is_quick: bool) -> list[Row]:
    """One row for each shape of cells and halo: cells and objects that are not the same voxel by voxel."""
    sizes = QUICK_EXACT if is_quick else {"shape": EXACT_SHAPE, "block_size": EXACT_BLOCK_SIZE}
    shape, block_size = sizes["shape"], sizes["block_size"]
    rows = []
    for name, truth in hard_shapes(shape).items():
        for halo in EXACT_HALOS[: 1 if is_quick else None]:
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
