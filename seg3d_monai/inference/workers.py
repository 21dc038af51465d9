"""Predicting blocks: in this process, or in local worker processes that each hold one predictor.

A block's result depends on its voxels alone, so neither the number of workers nor the order matters. Blocks are handed
out one by one as workers become free. This file knows neither journal nor stitching.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import torch

from seg3d_monai.inference.blocks import Block, Roi, roi_shape
from seg3d_monai.inference.instances import Instances
from seg3d_monai.inference.journal import PackedInstance, pack_instances

Predictor = Callable[[torch.Tensor, Roi], Instances]


class UnreadableBlockError(ValueError):
    """A block's voxels could not be read.

    Args:
        block: index of the block.
        message: one line for the user.
    """

    def __init__(self, block: int, message: str) -> None:
        super().__init__(block, message)
        self.block = block
        self.message = message

    def __str__(self) -> str:
        return self.message


def predict_block(volume: Any, predictor: Predictor, block: Block) -> list[PackedInstance]:
    """Read one block, predict it and pack what was found.

    Args:
        volume: the input (`seg3d_monai.data` volume).
        predictor: (float32 Tensor [C, d, h, w] of raw voxels, roi read) -> Instances in the block's frame.
        block: the block.

    Raises:
        UnreadableBlockError: if the voxels cannot be read.
        ValueError, TypeError: if the predictor raises one or does not return valid instances; names the block.
    """
    where = f"block {block.index} (roi {list(block.read)})"
    try:
        voxels = volume.read(block.read)
    except Exception as error:
        raise UnreadableBlockError(
            block.index,
            f"{where} cannot be read: {error}; repair it and run the same command again, finished blocks are kept",
        ) from error
    if voxels.shape[1:] != roi_shape(block.read):
        raise ValueError(f"{where}: the volume returned voxels of shape {voxels.shape}; the file may be truncated")
    tensor = torch.from_numpy(np.ascontiguousarray(voxels, dtype=np.float32))
    try:
        found = predictor(tensor, block.read)
        if not isinstance(found, Instances):
            raise TypeError(f"the predictor returned {type(found).__name__}; return seg3d_monai.inference.Instances")
        return pack_instances(found.place(block.read))
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{where}: {error}") from error
    except Exception as error:
        error.add_note(f"while predicting {where}; finished blocks are kept, the same command goes on with this one")
        raise


def predict_blocks(
    blocks: Sequence[Block],
    volume: Any,
    predictor: Predictor,
    *,
    num_workers: int,
    on_start: Callable[[int], None],
) -> Iterator[tuple[int, list[PackedInstance]]]:
    """Predict blocks, in any order of completion.

    Args:
        blocks: blocks to predict.
        volume: the input; pickled once per worker.
        predictor: pickled once per worker.
        num_workers: 1 predicts in this process; more start as many processes.
        on_start: called with a block's index when it is handed out.

    Yields:
        (block index, packed instances). After a failure the blocks in flight are still yielded, then it is raised.
    """
    if num_workers == 1 or len(blocks) <= 1:
        for block in blocks:
            on_start(block.index)
            yield block.index, predict_block(volume, predictor, block)
        return
    # Floating-point results depend on the thread count: workers use the driver's, so one worker and many agree.
    executor = ProcessPoolExecutor(
        max_workers=min(num_workers, len(blocks)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(volume, predictor, torch.get_num_threads()),
    )
    waiting = iter(blocks)
    running: dict[Future[list[PackedInstance]], int] = {}
    failure: BaseException | None = None

    def hand_out() -> None:
        block = next(waiting, None)
        if block is not None:
            on_start(block.index)
            running[executor.submit(_predict_in_worker, block)] = block.index

    try:
        for _ in range(num_workers + 1):  # one in reserve, so that no worker waits for the driver
            hand_out()
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                index = running.pop(future)
                error = future.exception()
                if error is None:
                    yield index, future.result()
                else:
                    failure = failure or error
                if failure is None:
                    hand_out()
        if isinstance(failure, BrokenProcessPool):
            raise RuntimeError(
                "a worker process died (out of memory is the usual cause); finished blocks are kept: run the same "
                "command again, with fewer workers or smaller blocks"
            ) from failure
        if failure is not None:
            raise failure
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


_worker: dict[str, Any] = {}


def _start_worker(volume: Any, predictor: Predictor, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    _worker.update(volume=volume, predictor=predictor)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # the driver was killed: nobody waits for this worker's result


def _predict_in_worker(block: Block) -> list[PackedInstance]:
    return predict_block(_worker["volume"], _worker["predictor"], block)
