"""What a run will take: memory, disk and time, from one block that is predicted for it.

This file knows neither the predictor nor how blocks are handed out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numcodecs
import numpy as np

from seg3d_monai.inference.blocks import BlockPlan, roi_shape
from seg3d_monai.inference.evidence import label_map
from seg3d_monai.inference.journal import unpack_instances
from seg3d_monai.inference.workers import BlockWorker, Predictor, UnreadableBlockError, worker_of_a_run

BYTES_OF_AN_INSTANCE = 250
"""While the stack is stitched."""
BYTES_OF_A_ROW = 250
"""Of an instance in the journal, beside its mask."""


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to take.

    Attributes:
        num_blocks: blocks of the plan.
        num_empty: blocks that need no prediction.
        num_instances: instances of all blocks, before stitching.
        memory: peak of one process, bytes.
        disk: OUTPUT and journal, bytes.
        seconds: prediction with all workers.
    """

    num_blocks: int
    num_empty: int
    num_instances: int
    memory: int
    disk: int
    seconds: float

    def __str__(self) -> str:
        empty = f", {self.num_empty} of them empty" if self.num_empty else ""
        return (
            f"{self.num_blocks} blocks{empty}, about {self.num_instances} instances; peak of memory "
            f"{self.memory / 1e9:.1f} GB a process, disk {self.disk / 1e9:.2f} GB, time {_duration(self.seconds)}"
        )


def estimate_run(
    plan: BlockPlan,
    volumes: Sequence[Any],
    predictors: Sequence[Predictor],
    min_score: float | None = None,
    num_workers: int = 1,
    num_empty: int = 0,
) -> Estimate:
    """Predict one block in the middle of the volume, twice (the first time warms up), and scale it to the run.

    Args:
        plan: the plan of blocks.
        volumes: the input, a volume for each time point.
        predictors: one for each time point.
        min_score: instances below it do not exist.
        num_workers: processes that will predict.
        num_empty: blocks that need no prediction.

    Raises:
        UnreadableBlockError: if the block cannot be read.
    """
    worker = worker_of_a_run(partial(BlockWorker, plan, volumes, predictors, min_score))
    i, j, k = (n // 2 for n in plan.grid)
    block = plan[(i * plan.grid[1] + j) * plan.grid[2] + k]
    for _ in range(2):
        start = time.perf_counter()
        (found,) = worker.predict([block.index])
        seconds = time.perf_counter() - start
    memory = worker.peak_memory()
    worker.close()
    if isinstance(found, UnreadableBlockError):
        raise found
    rows, _ = found
    labels = label_map(unpack_instances(rows), block.owned)
    written = len(numcodecs.Zstd(level=3).encode(np.ascontiguousarray(labels))) * 8 / 7  # and the coarser levels
    journalled = sum(len(row[-1]) + BYTES_OF_A_ROW for row in rows)
    # Blocks at the border own less: compare voxels, not numbers of blocks.
    share = prod(roi_shape(plan.region)) * plan.times / prod(roi_shape(block.owned))
    share *= 1 - num_empty / len(plan)
    num_instances = round(len(rows) * share)
    return Estimate(
        num_blocks=len(plan),
        num_empty=num_empty,
        num_instances=num_instances,
        memory=peak_memory(plan, volumes[0], memory, num_instances),
        disk=round((written + journalled) * share),
        seconds=seconds * share / num_workers,
    )


def peak_memory(plan: BlockPlan, volume: Any, peak_of_a_block: int, num_instances: int) -> int:
    """The peak of a process's memory, bytes.

    Args:
        plan: the plan of blocks.
        volume: the input.
        peak_of_a_block: what a process had had when it had predicted one block.
        num_instances: instances of all blocks.
    """
    read = prod(min(s + 2 * h, n) for s, h, n in zip(plan.block_size, plan.halo, plan.shape, strict=True))
    # Beside the block at the network another one is read (as stored and as float32), counted or painted.
    beside = read * (volume.shape[0] * (volume.dtype.itemsize + 4) + 16)
    return round(1.05 * (peak_of_a_block + beside)) + num_instances * BYTES_OF_AN_INSTANCE


def check_memory(expected: int, limit: int | None) -> None:
    """Refuse a run that will take too much.

    Raises:
        ValueError: if `expected` is above `limit`, bytes.
    """
    if limit is not None and expected > limit:
        raise ValueError(
            f"the run would take about {expected / 1e9:.1f} GB of memory a process, more than max_memory, "
            f"{limit / 1e9:.1f} GB; pass a smaller block_size"
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
