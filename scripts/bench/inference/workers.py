"""How much faster two Ray workers are than one: the bundle's model as work, one thread each.

Runs with two workers and with one take turns, in the order 2 1 2, so that a machine that grows slower or faster does so
for both. Each is a fresh process, and what is timed is the start of Ray and all of `predict_volume`: that of the
workers too. It takes a quarter of a minute whatever the stack, so the stack is as large as that of the section whole.

Two processes on one machine share its memory's bandwidth, its clock and its neighbours. How much more two of them do
that only read and predict blocks, without a driver, Ray or a start, is measured at each turn: no run can do better.
"""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from math import prod
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from bench.inference.bars import Row
from bench.inference.model import read_predictor, write_specimen_stack
from bench.inference.options import Options
from bench.inference.stacks import SPACING_UM
from bench.inference.whole import QUICK_SHAPE, SHAPE
from seg3d_monai.data import open_volume
from seg3d_monai.data.freed_memory import share_one_heap
from seg3d_monai.inference import predict_volume
from seg3d_monai.inference.blocks import BlockPlan, roi_shape
from seg3d_monai.inference.ray_workers import connect, import_ray

TURNS = (2, 1, 2)
BARE_BLOCKS, QUICK_BARE_BLOCKS = 6, 1
METHOD = (
    f"Workers: predict_volume with 2 and 1 Ray workers of one CPU thread, by turns {' '.join(map(str, TURNS))}, each "
    "in a fresh process, the start of Ray and of the workers included; faster is by the means. Machine: blocks a "
    f"second of two bare processes that each read and predict the same {BARE_BLOCKS} blocks, against one alone, at the "
    "same turns."
)


def measure(options: Options) -> list[Row]:
    """One row: seconds of each turn, how many times faster two workers are, and two bare processes."""
    folder, is_quick = options.folder, options.is_quick
    shape = QUICK_SHAPE if is_quick else SHAPE
    stack = write_specimen_stack(folder / "workers_stack.zarr", shape, is_quick)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    rates: dict[int, list[float]] = {1: [], 2: []}
    spawn = multiprocessing.get_context("spawn")
    for turn, num_workers in enumerate(TURNS):
        rates[num_workers].append(bare_rate(stack, options.checkpoint, num_workers, is_quick))
        output = folder / f"workers_{turn}.zarr"
        with ProcessPoolExecutor(1, mp_context=spawn) as fresh_process:
            job = fresh_process.submit(measure_here, stack, output, options.checkpoint, num_workers, is_quick)
            taken, num_blocks, num_objects = job.result()
        seconds[num_workers].append(taken)
    row: Row = {"shape": shape, "num_blocks": num_blocks, "num_objects": num_objects, "turns": TURNS}
    row |= {"one_s": seconds[1], "two_s": seconds[2], "one_bare_rate": rates[1], "two_bare_rate": rates[2]}
    return [row | {"speed_up": mean(seconds[1]) / mean(seconds[2]), "machine": mean(rates[2]) / mean(rates[1])}]


def measure_here(
    stack: Path, output: Path, checkpoint: Path | None, num_workers: int, is_quick: bool
) -> tuple[float, int, int | None]:
    """Seconds, blocks and objects of a run whose driver is this process."""
    torch.set_num_threads(1)  # workers take the driver's number
    predictor, cut = read_predictor(checkpoint, is_quick)
    start = time.perf_counter()
    ray = import_ray()
    connect(ray, None, num_cpus=num_workers)  # else one worker would be a thread
    options = {"num_workers": num_workers, "address": "auto", "spacing": SPACING_UM, "progress": False}
    done = predict_volume(stack, predictor, output, **options, **cut)
    ray.shutdown()
    return time.perf_counter() - start, done.num_blocks, done.num_objects


def bare_rate(stack: Path, checkpoint: Path | None, num_processes: int, is_quick: bool) -> float:
    """Blocks a second of so many processes at a time that read and predict, and nothing else."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager, ProcessPoolExecutor(num_processes, mp_context=spawn) as processes:
        together: Any = manager.Barrier(num_processes)
        jobs = [processes.submit(bare_seconds, stack, checkpoint, together, is_quick) for _ in range(num_processes)]
        number = QUICK_BARE_BLOCKS if is_quick else BARE_BLOCKS
        return sum(number / job.result() for job in jobs)


def bare_seconds(stack: Path, checkpoint: Path | None, together: Any, is_quick: bool) -> float:
    """Seconds of this process for its blocks, from the moment that all processes are ready; one more block before."""
    torch.set_num_threads(1)
    share_one_heap()  # as a run does
    predictor, cut = read_predictor(checkpoint, is_quick)
    volume = open_volume(stack, spacing=SPACING_UM)
    predictor = predictor.for_volume(volume)
    largest = sorted(BlockPlan.make(shape=volume.shape[1:], **cut), key=lambda block: -prod(roi_shape(block.read)))
    number = QUICK_BARE_BLOCKS if is_quick else BARE_BLOCKS
    for step, roi in enumerate(block.read for block in largest[: number + 1]):
        if step == 1:
            together.wait()
            start = time.perf_counter()
        predictor(torch.from_numpy(volume.read(roi).astype("float32")), roi)
    return time.perf_counter() - start
