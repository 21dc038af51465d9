"""How much faster two workers are than one: the bundle's model as work, one thread each.

Runs with one and with two workers take turns, in the order 1 2 2 1, so that a machine that grows slower or faster does
so for both. Each is a fresh process, and what is timed is all of `predict_volume`: the start of the workers too.
"""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from bench.inference.bars import Row
from bench.inference.model import read_predictor, write_specimen_stack
from bench.inference.options import Options
from bench.inference.stacks import SPACING_UM
from seg3d_monai.inference import predict_volume

SHAPE, QUICK_SHAPE = (128, 768, 768), (24, 72, 72)
TURNS = (1, 2, 2, 1)
METHOD = (
    "Workers: predict_volume with num_workers 1 and 2, one CPU thread a worker, by turns "
    f"{' '.join(map(str, TURNS))}, each in a fresh process, the start of the workers included."
)


def measure(options: Options) -> list[Row]:
    """One row: seconds of each turn, and how many times faster two workers are."""
    folder, is_quick = options.folder, options.is_quick
    shape = QUICK_SHAPE if is_quick else SHAPE
    stack = write_specimen_stack(folder / "workers_stack.zarr", shape, is_quick)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for turn, num_workers in enumerate(TURNS):
        output = folder / f"workers_{turn}.zarr"
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh_process:
            job = fresh_process.submit(measure_here, stack, output, options.checkpoint, num_workers, is_quick)
            taken, num_blocks, num_objects = job.result()
        seconds[num_workers].append(taken)
    row: Row = {"shape": shape, "num_blocks": num_blocks, "num_objects": num_objects, "turns": TURNS}
    row |= {"one_s": seconds[1], "two_s": seconds[2]}
    return [row | {"speed_up": sum(seconds[1]) / sum(seconds[2])}]


def measure_here(
    stack: Path, output: Path, checkpoint: Path | None, num_workers: int, is_quick: bool
) -> tuple[float, int, int | None]:
    """Seconds, blocks and objects of a run whose driver is this process."""
    torch.set_num_threads(1)  # workers take the driver's number
    predictor, cut = read_predictor(checkpoint, is_quick)
    start = time.perf_counter()
    done = predict_volume(stack, predictor, output, num_workers=num_workers, spacing=SPACING_UM, progress=False, **cut)
    return time.perf_counter() - start, done.num_blocks, done.num_objects
