"""Peak memory of a whole-stack run: it must not depend on the size of the stack.

A fresh process predicts a stack with a cheap predictor and reads its own peak of resident memory (VmHWM), from which
nothing is taken off. Blocks are as large in either stack.
"""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.inference.bars import Row
from bench.inference.options import Options
from bench.inference.stacks import SPACING_UM, ThresholdPredictor, Triple, blob_tile, write_tiled
from bench.memory import ResidentPeak
from seg3d_monai.inference import predict_volume

TILE, PITCH, CHUNKS = (64, 256, 256), (16, 32, 32), (32, 128, 128)
SMALL, LARGE = (256, 1024, 1024), (512, 2048, 2048)
GRID: dict[str, Any] = {"block_size": (64, 256, 256), "halo": (16, 32, 32)}
QUICK_TILE, QUICK_CHUNKS = (32, 64, 64), (16, 32, 32)
QUICK_SMALL, QUICK_LARGE = (32, 64, 64), (32, 128, 128)
QUICK_GRID: dict[str, Any] = {"block_size": (16, 32, 32), "halo": (8, 12, 12)}
METHOD = (
    "Memory: a fresh process each predicts uint16 stacks of 0.5 and 4 GiB by threshold and connected components; peak "
    "is VmHWM, Python and libraries included; 1 GB is 1e9 bytes."
)


def measure(options: Options) -> list[Row]:
    """One row: the peaks of both stacks, and their ratio (None where the system does not tell a process its peak)."""
    is_quick = options.is_quick
    shapes = {"small": QUICK_SMALL, "large": QUICK_LARGE} if is_quick else {"small": SMALL, "large": LARGE}
    tile = blob_tile(QUICK_TILE if is_quick else TILE, PITCH)
    row: Row = {}
    for name, shape in shapes.items():
        stack = write_tiled(options.folder / f"memory_{name}.zarr", tile, shape, QUICK_CHUNKS if is_quick else CHUNKS)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as fresh_process:
            run = fresh_process.submit(measure_here, stack, QUICK_GRID if is_quick else GRID, options.threads).result()
        row |= {name: describe(shape), **{f"{name}_{key}": value for key, value in run.items()}}
    peaks = [row[f"{name}_peak_gb"] for name in shapes]
    return [row | {"ratio": None if None in peaks else peaks[1] / peaks[0]}]


def measure_here(stack: Path, grid: dict[str, Any], threads: int) -> Row:
    """Peak, objects and seconds of a run in this process."""
    torch.set_num_threads(threads)
    resident = ResidentPeak() if Path("/proc/self/clear_refs").exists() else None
    output, start = stack.with_name(f"{stack.stem}_output.zarr"), time.perf_counter()
    done = predict_volume(stack, ThresholdPredictor(), output, spacing=SPACING_UM, progress=False, **grid)
    row: Row = {"num_blocks": done.num_blocks, "num_objects": done.num_objects}
    row["seconds"] = time.perf_counter() - start
    row["peak_gb"] = None if resident is None else (resident.before + resident.growth()) / 1e9
    row["after_import_gb"] = None if resident is None else resident.before / 1e9
    return row


def describe(shape: Triple) -> str:
    """Bytes of a uint16 stack in words."""
    return f"{2 * shape[0] * shape[1] * shape[2] / 2**30:.3g} GiB"
