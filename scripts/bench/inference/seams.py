"""Errors at seams: dense tissue, seen a little differently by every block."""

import math
import sys
import time
from collections import Counter
from typing import Any

from bench.inference.bars import Row
from bench.inference.errors import cell_errors
from bench.inference.options import Options
from bench.inference.tissue import DisplacedTissue, image_of, tissue_seeds, voronoi
from seg3d_monai.inference import predict_labels

SHAPE, BLOCK_SIZE, HALO = (256, 256, 256), (128, 128, 128), (32, 32, 32)
DIAMETERS, SIGMAS, NUM_TISSUES = (12, 20, 30), (0.0, 1.0, 2.0), 3
QUICK: dict[str, Any] = {"shape": (48, 56, 64), "block_size": (24, 28, 32), "halo": (10, 10, 10), "num_tissues": 1}
QUICK_DIAMETERS, QUICK_SIGMAS = (9,), (0.0, 1.0)
METHOD = (
    "Seams: Voronoi cells of a jittered lattice that is turned and shifted at random; a predictor that returns the "
    "cells of the block's ROI, exactly, with random scores, but of seeds displaced by normal draws of the block's own. "
    "Cells are counted as split, merged or lost by the rule in scripts/bench/inference/errors.py, at seams and away "
    "from them; excess is the share of wrong cells at seams less that away from seams, with its standard error."
)


def measure(options: Options) -> list[Row]:
    """One row for each diameter and displacement, all tissues together."""
    is_quick = options.is_quick
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
    num_cells = [max(counts["cells"], 1) for counts in (seam, away)]
    rates = [counts["wrong"] / n for counts, n in zip((seam, away), num_cells, strict=True)]
    variance = sum(rate * (1 - rate) / n for rate, n in zip(rates, num_cells, strict=True))
    row: Row = {"diameter": diameter, "sigma": sigma, "shape": shape, "block_size": block_size, "halo": halo}
    row |= {"tissues": num_tissues, "objects": num_objects, "seam": seam, "away": away, "excess": rates[0] - rates[1]}
    row["excess_error"] = math.sqrt(variance)
    row["seconds"] = time.perf_counter() - start
    print(f"diameter {diameter:g} sigma {sigma:g}: {seam} at seams, {away} away", file=sys.stderr, flush=True)
    return row
