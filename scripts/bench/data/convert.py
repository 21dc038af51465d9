"""`seg3d convert` with two threads against one: a stack as OME-Zarr with a pyramid, out of Zarr chunks and TIFF tiles.

What is timed is `convert_volume` as a whole, with levels, compression and the files' names. Every turn writes an
output of its own in a fresh process, in the order 1 2 2 1, so that a machine that grows slower does so for both.
Zarr's own threads stay as they are: all of ours share them, so if there were one, codecs would take turns in it.
"""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from shutil import rmtree

from bench.data.bars import Row
from bench.data.options import Options
from bench.data.reads import PITCH, QUICK_PITCH, QUICK_TILE, TILE, write_tiff
from bench.inference.stacks import blob_tile, write_tiled
from seg3d_monai.data import open_volume

SHAPE, CHUNKS = (256, 1024, 1024), (32, 128, 128)
QUICK_SHAPE, QUICK_CHUNKS = (32, 128, 128), (16, 32, 32)
TURNS = (1, 2, 2, 1)
METHOD = (
    "Convert: a uint16 stack of 0.54 GB, in zstd chunks of 32x128x128 or deflated TIFF tiles of 128x128, to a sharded "
    "OME-Zarr with a pyramid, by one and by two threads; by turns, each in a fresh process."
)


def measure(options: Options) -> list[Row]:
    """One row for each format: seconds of each turn, and how many times faster two threads are."""
    folder = options.folder / "convert"
    folder.mkdir()
    shape, chunks = (QUICK_SHAPE, QUICK_CHUNKS) if options.is_quick else (SHAPE, CHUNKS)
    tile = blob_tile(*((QUICK_TILE, QUICK_PITCH) if options.is_quick else (TILE, PITCH)))
    rows = []
    for kind in ("Zarr", "TIFF"):
        if kind == "Zarr":
            stack = write_tiled(folder / "stack.zarr", tile, shape, chunks)
        else:
            stack = write_tiff(folder / "stack.tif", tile, shape, chunks[1:])
        seconds: dict[int, list[float]] = {turn: [] for turn in TURNS}
        for num_workers in TURNS:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh_process:
                took = fresh_process.submit(convert_here, stack, folder / "out.zarr", num_workers).result()
            seconds[num_workers].append(took)
            rmtree(folder / "out.zarr")
        volume = open_volume(stack)
        size = volume.dtype.itemsize * volume.shape[1] * volume.shape[2] * volume.shape[3]
        facts = {"format": kind, "gigabytes": size / 1e9, "turns": TURNS, "one_s": seconds[1], "two_s": seconds[2]}
        rows.append({**facts, "speed_up": sum(seconds[1]) / sum(seconds[2])})
    return rows


def convert_here(stack: Path, output: Path, num_workers: int) -> float:
    """Seconds of one conversion in this process, imports aside."""
    from seg3d_monai.data.convert import convert_volume

    start = time.perf_counter()
    convert_volume(stack, output, spacing=(2.0, 0.5, 0.5), num_workers=num_workers)
    return time.perf_counter() - start
