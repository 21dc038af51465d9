"""What a worker does with blocks: predict, count and link, paint. Threads of this process as workers.

A block's result depends on its voxels alone, so neither the number of workers nor the order matters. The driver alone
writes the journal: a worker gets the rows that it needs and returns new ones. This file must not know how the calls
are handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from seg3d_monai.data.freed_memory import give_back, main_heap_thread, share_one_heap
from seg3d_monai.data.intensity import check_block
from seg3d_monai.data.memory_limit import peak_memory
from seg3d_monai.inference.blocks import Block, BlockPlan, Roi, roi_shape
from seg3d_monai.inference.evidence import Census, Ints, Links, link_block, take_census
from seg3d_monai.inference.instances import Instances
from seg3d_monai.inference.journal import PackedInstance, RowSource, pack_instances
from seg3d_monai.inference.paint import Claims, paint_block
from seg3d_monai.inference.schedule import Workers
from seg3d_monai.inference.table import ObjectCounts, count_objects
from seg3d_monai.inference.writer import LabelWriter

BLOCKS_OF_A_HEAP = 16
"""Blocks after which a worker gives back what is free: what the heap's gaps hold would grow with the stack."""

Predictor = Callable[[torch.Tensor, Roi], Instances]
Rows = Mapping[int, Sequence[PackedInstance]]


class UnreadableBlockError(ValueError):
    """A block's voxels could not be read, or are not finite.

    Args:
        where: names the block.
        reason: what happened.
    """

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"{self.where} cannot be read: {self.reason}; repair it and run the same command again, finished blocks "
            "are kept, or leave a hole there with --skip_bad"
        )


class LabelTarget(Protocol):
    """What takes painted blocks."""

    def write(self, block: Block, labels: NDArray[np.integer]) -> None:
        """Take the ids [d, h, w] of a block's owned ROI."""
        ...


class BlockWorker:
    """Holds the input and the predictor; its calls may overlap, and share one thread for the network.

    Args:
        plan: the plan of blocks.
        volumes: the input, a volume for each time point.
        predictors: (float32 Tensor [C, d, h, w] of raw voxels, roi read) -> Instances in the block's frame, one for
            each time point.
        min_score: instances below it do not exist.
        network_thread: one thread, closed with the worker; None begins one.
    """

    def __init__(
        self,
        plan: BlockPlan,
        volumes: Sequence[Any],
        predictors: Sequence[Predictor],
        min_score: float | None = None,
        network_thread: ThreadPoolExecutor | None = None,
    ) -> None:
        self._plan = plan
        self._volumes = volumes
        self._predictors = predictors
        self._min_score = min_score
        self._num_predicted = 0
        # Always the same thread: every thread would keep the memory of a forward pass for itself.
        self._network = network_thread or ThreadPoolExecutor(
            1, "network", torch.set_num_threads, (torch.get_num_threads(),)
        )

    def predict(self, indices: Sequence[int]) -> list[tuple[list[PackedInstance], Census] | UnreadableBlockError]:
        """Read and predict blocks, together if the predictor has `predict_batch` and there are several.

        Returns:
            For each block its packed instances and their census, or why it could not be read.

        Raises:
            ValueError, TypeError: if the predictor raises one or does not return valid instances; names the block.
        """
        results: dict[int, tuple[list[PackedInstance], Census] | UnreadableBlockError] = {}
        blocks, tensors = [], []
        for index in indices:
            try:
                tensors.append(self._read(self._plan[index]))
                blocks.append(self._plan[index])
            except UnreadableBlockError as error:
                results[index] = error
        if blocks:
            found = self._network.submit(self._found, blocks, tensors).result()
            del tensors
            for block, instances in zip(blocks, found, strict=True):
                placed = instances.place(block.read)
                kept = [i for i in placed if self._min_score is None or i.score >= self._min_score]
                results[block.index] = pack_instances(placed), take_census(self._plan, block.index, kept)
                self._num_predicted += 1
                if self._num_predicted % BLOCKS_OF_A_HEAP == 0:
                    give_back()
        return [results[index] for index in indices]

    def count(self, block: int, rows: Rows) -> Census:
        """Take the census of a block that was predicted before."""
        return take_census(self._plan, block, RowSource(rows).instances(block, min_score=self._min_score))

    def link(self, block: int, rows: Rows, homes: Mapping[int, Ints]) -> Links:
        """Match a block's instances with those of the neighbours before it."""
        return link_block(self._plan, block, RowSource(rows), homes, self._min_score)

    def paint(self, writer: LabelTarget, claims: Claims, rows: Rows) -> ObjectCounts:
        """Paint and write a block's owned ROI."""
        block = self._plan[claims.block]
        painted = paint_block(self._plan, RowSource(rows), claims, self._min_score)
        writer.write(block, painted.values.astype(np.uint32)[painted.slots])
        return count_objects(painted.slots, painted.values, block.owned)

    def copy(self, writer: LabelWriter, index: int) -> None:
        """Copy the voxels of a block's owned ROI; those that cannot be read stay 0."""
        block = self._plan[index]
        try:
            voxels = self._volumes[block.time].read(block.owned)
        except Exception:  # of any reader; prediction has named it
            return
        writer.copy(block, voxels)

    def build_tiles(self, writer: LabelWriter, name: str, tiles: Sequence[int]) -> None:
        """Make tiles of a coarser level."""
        for tile in tiles:
            writer.build_tile(name, tile)

    def peak_memory(self) -> int:
        """The most memory that this process has had, bytes; 0 where the system does not tell."""
        return peak_memory() or 0

    def close(self) -> None:
        """End the thread of the network."""
        self._network.shutdown()

    def _read(self, block: Block) -> torch.Tensor:
        where = _where(block)
        try:
            voxels = self._volumes[block.time].read(block.read)
            check_block(voxels, block.read, self._volumes[block.time].path)
        except Exception as error:
            raise UnreadableBlockError(where, str(error)) from error
        if voxels.shape[1:] != roi_shape(block.read):
            raise ValueError(f"{where}: the volume returned voxels of shape {voxels.shape}; the file may be truncated")
        return torch.from_numpy(np.ascontiguousarray(voxels, dtype=np.float32))

    def _found(self, blocks: Sequence[Block], tensors: Sequence[torch.Tensor]) -> list[Instances]:
        predictor: Any = self._predictors[blocks[0].time]
        if len(blocks) == 1 or not hasattr(predictor, "predict_batch"):
            pairs = zip(blocks, tensors, strict=True)
            return [_checked(partial(predictor, tensor, block.read), _where(block)) for block, tensor in pairs]
        where = f"blocks {[block.index for block in blocks]}"
        found = _checked_all(partial(predictor.predict_batch, tensors, [block.read for block in blocks]), where)
        if len(found) != len(blocks):
            raise ValueError(f"{where}: predict_batch returned {len(found)} results")
        return found


class ThreadWorkers:
    """Threads of this process that share one worker object, so that reading and packing overlap the network.

    Args:
        worker: the worker object.
        calls: calls that may run at a time.
    """

    def __init__(self, worker: BlockWorker, *, calls: int = 2) -> None:
        self.capacity = calls
        self._worker = worker
        self._threads = ThreadPoolExecutor(calls, "block")

    def submit(self, method: str, *args: Any) -> Future[Any]:
        """Call a method of the worker object."""
        return self._threads.submit(getattr(self._worker, method), *args)

    def close(self) -> None:
        """Wait for the calls that run, and end."""
        self._threads.shutdown(cancel_futures=True)
        self._worker.close()


def start_workers(
    make_worker: Callable[..., BlockWorker], num_workers: int, address: str | None, gpus: float
) -> Workers:
    """A thread of this process, or several processes on Ray; `predict_volume` describes the arguments."""
    make_worker = partial(worker_of_a_run, make_worker)
    if num_workers == 1 and address is None:
        return ThreadWorkers(make_worker())
    from seg3d_monai.inference.ray_workers import RayWorkers

    return RayWorkers(
        make_worker,
        num_workers=num_workers,
        address=address,
        num_threads=torch.get_num_threads(),
        gpus_per_worker=gpus,
    )


def worker_of_a_run(make_worker: Callable[..., BlockWorker]) -> BlockWorker:
    """Make a worker in the process in which it works; `make_worker` takes the keyword `network_thread`."""
    share_one_heap()
    thread = main_heap_thread("network", torch.set_num_threads, torch.get_num_threads())
    return make_worker(network_thread=thread)


def no_predictor(block: torch.Tensor, roi: Roi) -> Any:
    """Stand for the predictor where all blocks are predicted."""
    raise AssertionError("a block is predicted again")


def _where(block: Block) -> str:
    return f"block {block.index} (roi {list(block.read)})"


def _checked(predict: Callable[[], Any], where: str) -> Instances:
    (found,) = _checked_all(lambda: [predict()], where)
    return found


def _checked_all(predict: Callable[[], Sequence[Any]], where: str) -> list[Instances]:
    """What a predictor returned; its errors name the place."""
    try:
        found = list(predict())
        for instances in found:
            if not isinstance(instances, Instances):
                kind = type(instances).__name__
                raise TypeError(f"the predictor returned {kind}; return seg3d_monai.inference.Instances")
    except (ValueError, TypeError) as error:
        kind_of_error = TypeError if isinstance(error, TypeError) else ValueError
        raise kind_of_error(f"{where}: {error}") from error
    except Exception as error:
        error.add_note(f"while predicting {where}; finished blocks are kept, the same command goes on with this one")
        raise
    return found
