"""The steps of a run over the journal and the workers, each of which goes on where it was left.

Predict and link (together, as blocks come in), stitch, paint, build coarser levels, write the table. Only stitching,
which takes seconds, is done anew after a kill. This file knows neither the input's files nor how the run was asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from seg3d_monai.data.freed_memory import give_back, keep_freed_memory
from seg3d_monai.inference.blocks import BlockPlan
from seg3d_monai.inference.journal import DONE, EMPTY, UNREADABLE, Journal
from seg3d_monai.inference.paint import Stitched, stitch_records
from seg3d_monai.inference.schedule import Call, Workers, run_calls
from seg3d_monai.inference.stitch import gather_records
from seg3d_monai.inference.table import ObjectTotals
from seg3d_monai.inference.workers import LabelTarget, UnreadableBlockError
from seg3d_monai.inference.writer import LabelWriter

_CHUNKS_OF_A_CALL = 8


@dataclass
class Run:
    """A run.

    Args:
        plan: the plan of blocks.
        journal: its journal.
        workers: hold a `BlockWorker` each.
        min_score: instances below it do not exist.
        min_volume: objects with fewer voxels are left out.
        batch_size: blocks that the network takes together.
        skip_bad: leave a hole where voxels cannot be read, instead of stopping.
        progress: show progress bars.
        is_stopping: whether no more work may begin.
    """

    plan: BlockPlan
    journal: Journal
    workers: Workers
    min_score: float | None = None
    min_volume: int = 0
    batch_size: int = 1
    skip_bad: bool = False
    progress: bool = False
    is_stopping: Callable[[], bool] = lambda: False

    def predict(self, on_first: Callable[[int, int], None] = lambda memory, num_instances: None) -> int:
        """Predict all blocks that are neither done nor empty, and work out the evidence of all.

        Args:
            on_first: called after the first blocks that are predicted, with the peak of a worker's memory, bytes, and
                the mean number of their instances; may raise.

        Returns:
            Number of blocks predicted.

        Raises:
            UnreadableBlockError: without `skip_bad`; the blocks in flight are finished before.
        """
        finished = self.journal.finished()
        missing = [index for index in range(len(self.plan)) if index not in finished]
        # What was left as a hole is tried again; it and its neighbours were linked without it.
        holes = self.journal.blocks_in_state(UNREADABLE)
        self.journal.forget_links({near for hole in holes for near in [hole, *self.plan.neighbours(hole)]})
        self._work(missing, on_first)
        return len(missing)

    def link(self) -> None:
        """Work out the evidence of all blocks that are done."""
        self._work([], lambda memory, num_instances: None)

    def _work(self, missing: Sequence[int], on_first: Callable[[int, int], None]) -> None:
        done, counted = self.journal.blocks_in_state(DONE), self.journal.blocks_with("census")
        evidence = _Evidence(self, done | set(missing), counted)
        queue: deque[Call] = deque(evidence.ready())
        queue.extend(self._count_call(index) for index in sorted(done - counted))
        queue.extend(self._predict_call(batch) for batch in self._batches(missing))
        failures: list[UnreadableBlockError] = []
        is_first = True
        with self._bar("predict", "block", len(self.plan), len(self.plan) - len(missing)) as bar:
            for call, result in run_calls(self.workers, queue, self.is_stopping):
                settled: list[int] = []
                if call.method == "link":
                    self.journal.store_links(call.key, result)
                elif call.method == "count":
                    self.journal.store_census(call.key, result)
                    settled = [call.key]
                else:
                    found = dict(zip(call.key, result, strict=True))
                    bad = {index: e for index, e in found.items() if isinstance(e, UnreadableBlockError)}
                    self.journal.finish_blocks({index: found[index] for index in call.key if index not in bad})
                    for index, error in bad.items():
                        self.journal.mark_unreadable(index, error.reason)
                    if not self.skip_bad:
                        failures += bad.values()
                    settled = [index for index in call.key if self.skip_bad or index not in bad]
                    bar.update(len(call.key))
                    if is_first and len(bad) < len(found):
                        is_first = False
                        num_instances = sum(len(found[index][0]) for index in found if index not in bad)
                        on_first(self.workers.submit("peak_memory").result(), num_instances // len(found))
                for index in settled:
                    queue.extendleft(evidence.settle(index))
                if failures:
                    queue.clear()
        if failures:
            raise failures[0]

    def stitch(self) -> Stitched:
        """Join the instances of all blocks into objects."""
        keep_freed_memory()  # larger arrays from the system again: the network, for which the heap took them, is done
        give_back()
        records = gather_records(len(self.plan), self.journal.evidence_counts(), self.journal.evidence())
        return stitch_records(
            self.plan,
            self.journal,
            records,
            min_score=self.min_score,
            min_volume=self.min_volume,
            progress=self.progress,
        )

    def paint(self, stitched: Stitched, writer: LabelTarget) -> None:
        """Paint every block that holds an object and is not painted."""
        give_back()
        painted = self.journal.blocks_with("painted")
        blocks = stitched.painted_blocks()
        queue = deque(self._paint_call(stitched, writer, block) for block in blocks if block not in painted)
        with self._bar("paint", "block", len(blocks), len(blocks) - len(queue)) as bar:
            for call, counts in run_calls(self.workers, queue, self.is_stopping):
                self.journal.store_painted(call.key, counts)
                bar.update()

    def copy_image(self, writer: LabelWriter) -> None:
        """Copy the input, block by block."""
        copied = self.journal.tiles("0")
        queue = deque(
            Call("copy", index, lambda index=index: (writer, index))  # type: ignore[misc]
            for index in range(len(self.plan))
            if index not in copied
        )
        with self._bar("copy", "block", len(self.plan), len(copied)) as bar:
            for call, _ in run_calls(self.workers, queue, self.is_stopping):
                self.journal.store_tiles("0", [call.key])
                bar.update()

    def build_levels(self, writer: LabelWriter) -> None:
        """Build the coarser levels, one after the other."""
        for name in writer.coarse_arrays():
            give_back()
            built = self.journal.tiles(name)
            missing = [tile for tile in range(writer.num_tiles(name)) if tile not in built]
            size = max(1, _CHUNKS_OF_A_CALL // writer.chunks_of_a_tile(name))
            parts = [missing[i : i + size] for i in range(0, len(missing), size)]
            queue = deque(Call("build_tiles", part, lambda n=name, p=part: (writer, n, p)) for part in parts)  # type: ignore[misc]
            with self._bar(f"level {name}", "tile", writer.num_tiles(name), len(built)) as bar:
                for call, _ in run_calls(self.workers, queue, self.is_stopping):
                    self.journal.store_tiles(name, call.key)
                    bar.update(len(call.key))

    def count(self, stitched: Stitched) -> ObjectTotals:
        """Gather what the painted blocks hold of each object."""
        give_back()
        totals = ObjectTotals(self.plan, stitched.num_objects)
        for block, counts in self.journal.painted():
            totals.add(block, counts)
        return totals

    def _batches(self, missing: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Missing blocks in the batches that the plan gives them: these do not depend on what was done before."""
        if self.batch_size == 1:
            yield from ((index,) for index in missing)
            return
        empty = self.journal.blocks_in_state(EMPTY)
        wanted, still = set(missing), self.plan.blocks_per_time
        for time in range(self.plan.times):
            of_time = [index for index in range(time * still, (time + 1) * still) if index not in empty]
            for start in range(0, len(of_time), self.batch_size):
                batch = tuple(of_time[start : start + self.batch_size])
                if not wanted.isdisjoint(batch):
                    yield batch

    def _predict_call(self, batch: tuple[int, ...]) -> Call:
        def arguments() -> tuple[Any, ...]:
            for index in batch:
                self.journal.start_block(index)
            return (batch,)

        return Call("predict", batch, arguments)

    def _count_call(self, block: int) -> Call:
        return Call("count", block, lambda: (block, {block: self.journal.rows(block, min_score=self.min_score)}))

    def link_call(self, block: int) -> Call:
        """The call that links a block with its neighbours before it."""

        def arguments() -> tuple[Any, ...]:
            read = self.plan[block].read
            before = [other for other in self.plan.neighbours(block) if other < block]
            homes = {index: self.journal.home(index) for index in [*before, block]}
            homes = {index: home for index, home in homes.items() if len(home)}
            rows = {index: self.journal.rows(index, read, self.min_score) for index in homes} if block in homes else {}
            return block, rows, homes

        return Call("link", block, arguments)

    def _paint_call(self, stitched: Stitched, writer: LabelTarget, block: int) -> Call:
        def arguments() -> tuple[Any, ...]:
            claims = stitched.claims(block)
            sources = {block, *(visitor.block for visitor in claims.visitors)}
            owned = self.plan[block].owned
            return writer, claims, {index: self.journal.rows(index, owned, self.min_score) for index in sources}

        return Call("paint", block, arguments)

    def _bar(self, name: str, unit: str, total: int, done: int) -> tqdm[Any]:
        return tqdm(total=total, initial=done, desc=name, unit=unit, disable=not self.progress)


class _Evidence:
    """Which blocks can be linked: those that are counted, as are all neighbours before them.

    Args:
        run: the run.
        wanted: blocks that are or will be counted.
        counted: those that are.
    """

    def __init__(self, run: Run, wanted: set[int], counted: set[int]) -> None:
        self._run = run
        self._wanted, self._counted = wanted, set(counted)
        self._linked = run.journal.blocks_with("links")
        self._waits: dict[int, int] = {}  # block -> how many that it needs are not counted yet

    def ready(self) -> list[Call]:
        """Calls for what can be linked now."""
        return self._calls(sorted(self._counted - self._linked))

    def settle(self, block: int) -> list[Call]:
        """Note that a block is counted, or never will be; calls for what can be linked since then."""
        self._counted.add(block)
        after = [other for other in self._run.plan.neighbours(block) if other > block]
        return self._calls([block, *after])

    def _calls(self, blocks: Iterable[int]) -> list[Call]:
        calls = []
        for block in blocks:
            if block in self._linked or block not in self._wanted:
                continue
            if block in self._waits:
                self._waits[block] -= 1
            else:
                needed = [other for other in self._run.plan.neighbours(block) if other <= block]
                self._waits[block] = sum(i in self._wanted and i not in self._counted for i in [*needed, block])
            if self._waits[block] == 0:
                del self._waits[block]
                self._linked.add(block)
                calls.append(self._run.link_call(block))
        return calls
