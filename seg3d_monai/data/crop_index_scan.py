"""Measures label volumes block by block, in this process or several, and packs what the crops of a volume hold.

A block is made of whole stored chunks, so that each is decoded once. Workers measure and read intensities; the process
that called joins and writes. A worker ends when that process does, however that ends.

Must not know: SQL, manifests beyond a row, the final index.
"""

import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice, product
from math import prod
from multiprocessing.connection import wait as wait_for_end
from typing import Any

import numpy as np
from tqdm import tqdm

from seg3d_monai.data.crop_grid import CropGrid
from seg3d_monai.data.crop_index_format import (
    COUNT,
    CROP_COLUMNS,
    CROPS_PER_BLOCK,
    CROPS_PER_LIST,
    INSTANCE,
    INSTANCES_PER_BLOCK,
    VISIBLE,
    pack_visible,
)
from seg3d_monai.data.crop_index_journal import ScanJournal
from seg3d_monai.data.data_config import DataConfig
from seg3d_monai.data.file_evidence import Evidence, file_stat
from seg3d_monai.data.intensity import check_finite, measure_intensity
from seg3d_monai.data.label_scan import check_label, join_crops, join_instances, measure_block
from seg3d_monai.data.manifest import ManifestRow
from seg3d_monai.data.volume import Roi, Volume, storage_rois

_BLOCK_VOXELS = 2**24
_WORKER_VOXELS = 2**27  # that a worker must find to do, or starting it would take longer
_TASKS_AHEAD = 16  # for each worker: what they do while volumes are packed
INTENSITY = -1  # in place of the number of a block


def open_files(row: ManifestRow) -> dict[str, Volume]:
    """A row's volumes by the column that names them, checked against each other.

    Raises:
        ValueError: the labels are no labels, or shapes differ.
    """
    image = row.open_image()
    files = {"image": image}
    if row.label is not None:
        files["label"] = row.open_label()
        check_label(files["label"].dtype, files["label"].shape[0], row.name)
    mask = row.open_ignore()
    if mask is not None:
        files["ignore"] = mask
    for column, volume in files.items():
        if tuple(volume.shape[1:]) != tuple(image.shape[1:]):
            raise ValueError(
                f"{row.name}: the image is {tuple(image.shape[1:])} and {column} is {tuple(volume.shape[1:])} "
                "(z, y, x); they must be the same voxels"
            )
    return files


@dataclass
class ScanJob:
    """A volume to scan.

    Args:
        row: of the manifest.
        scan_id: its number in the journal.
        files: its volumes.
        evidence: of each of them, before the scan.
    """

    row: ManifestRow
    scan_id: int
    files: dict[str, Volume]
    evidence: dict[str, Evidence]

    def __post_init__(self) -> None:
        label = self.files.get("label")
        self.blocks: list[Roi] = [] if label is None else list(storage_rois(label, _BLOCK_VOXELS))
        self.missing: set[int] = set()
        self.intensity: Any = None


@dataclass(frozen=True)
class _Task:
    """What a worker does: a block of labels, or the intensity of the image."""

    job: int
    number: int
    row: ManifestRow
    roi: Roi | None
    config: DataConfig
    skip_bad: bool

    def run(self) -> Any:
        if self.roi is None:
            image = self.row.open_image()
            check_finite(image)
            return measure_intensity(image, percentiles=self.config.percentiles).to_json()
        return _measure(self.row, self.roi, self.config, self.skip_bad)


def scan_volumes(
    jobs: Sequence[ScanJob],
    journal: ScanJournal,
    config: DataConfig,
    *,
    num_workers: int,
    skip_bad: bool,
    progress: bool,
) -> None:
    """Scan volumes into the journal, going on with those of which blocks are there.

    Raises:
        ValueError: a block cannot be read and is not to be skipped, labels are no ids, an image is not finite, or a
            file changed meanwhile.
        RuntimeError: a worker was killed.
    """
    global _last_opened
    _last_opened = None  # of an earlier build: files may have been written again since
    for job in jobs:
        job.missing = {INTENSITY, *range(len(job.blocks))} - journal.parts(job.scan_id)
    total = sum(prod(job.files["image"].shape[1:]) for job in jobs)
    done = sum(_num_voxels(job.blocks[n]) for job in jobs for n in set(range(len(job.blocks))) - job.missing)
    num_workers = min(num_workers, 1 + (total - done) // _WORKER_VOXELS)
    with tqdm(total=total, initial=done, desc="index", unit="voxel", unit_scale=True, disable=not progress) as bar:
        for task, result in _run(_tasks(jobs, config, skip_bad), num_workers):
            job = jobs[task.job]
            bar.set_postfix_str(job.row.name, refresh=False)
            if task.roi is None:
                job.intensity = result
            else:
                journal.add_part(job.scan_id, task.number, *result)
                bar.update(_num_voxels(task.roi))
            job.missing.remove(task.number)
            if not job.missing:
                _finish(job, journal, config)
                if not job.blocks:
                    bar.update(prod(job.files["image"].shape[1:]))
    journal.commit()


def _tasks(jobs: Sequence[ScanJob], config: DataConfig, skip_bad: bool) -> Iterator[_Task]:
    for position, job in enumerate(jobs):
        row = replace(job.row, classes=0, attributes={})  # tables of classes need not travel with every block
        for number in sorted(job.missing):
            yield _Task(position, number, row, None if number == INTENSITY else job.blocks[number], config, skip_bad)


def _run(tasks: Iterator[_Task], num_workers: int) -> Iterator[tuple[_Task, Any]]:
    """Results as they come. This process is one of the workers: it measures whenever no result waits to be written."""
    if num_workers == 1:
        yield from ((task, task.run()) for task in tasks)
        return
    # Never plain fork: zarr's threads do not survive it. The server imports once for all workers.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(num_workers - 1, mp_context=context, initializer=_end_with_parent)
    waiting: dict[Future[Any], _Task] = {}
    try:
        while True:
            for task in islice(tasks, max(0, _TASKS_AHEAD * (num_workers - 1) - len(waiting))):
                waiting[pool.submit(task.run)] = task
            done = [future for future in waiting if future.done()]
            if not done:
                own = next(tasks, None) or _take_back(waiting)
                if own is not None:
                    yield own, own.run()
                elif not waiting:
                    return
                else:
                    done = list(wait(waiting, return_when=FIRST_COMPLETED).done)
            for future in done:
                yield waiting.pop(future), future.result()
    except BrokenProcessPool:
        text = "a worker was killed, perhaps for want of memory; run it again, with fewer workers"
        raise RuntimeError(text) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _take_back(waiting: dict[Future[Any], _Task]) -> _Task | None:
    """A task that no worker has begun, the last one."""
    for future in reversed(waiting):
        if future.cancel():
            return waiting.pop(future)
    return None


def _end_with_parent() -> None:
    """End this worker with its parent, which may be killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for_end([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_last_opened: tuple[ManifestRow, dict[str, Volume], CropGrid] | None = None


def _measure(row: ManifestRow, roi: Roi, config: DataConfig, skip_bad: bool) -> tuple[np.ndarray, list[list[int]]]:
    """Rows of one block, and the chunks of it that cannot be read."""
    global _last_opened
    if _last_opened is None or _last_opened[0] != row:
        files = open_files(row)
        _last_opened = (row, files, CropGrid(files["label"].shape[1:], config.crop_size, config.step))
    _, files, grid = _last_opened
    unreadable: list[list[int]] = []
    try:
        block = _read_labels(files, roi)
    except ValueError as error:
        if not skip_bad:
            raise ValueError(
                f"{row.name}: {error}; mend the file, or leave out what cannot be read with `--skip_bad`"
            ) from error
        block, unreadable = _read_around(files, roi)
    return measure_block(block, roi[:3], grid, name=row.name), unreadable


def _read_labels(files: dict[str, Volume], roi: Roi) -> np.ndarray:
    """Labels [d, h, w], with ignore where the mask says so."""
    block = files["label"].read(roi)[0]
    if "ignore" in files:
        block[files["ignore"].read(roi)[0] != 0] = np.iinfo(block.dtype).max
    return block


def _read_around(files: dict[str, Volume], roi: Roi) -> tuple[np.ndarray, list[list[int]]]:
    """Labels with ignore in place of the chunks that cannot be read, and those."""
    label = files["label"]
    block = np.full([roi[axis + 3] - roi[axis] for axis in range(3)], np.iinfo(label.dtype).max, label.dtype)
    unreadable: list[list[int]] = []
    steps = (range(roi[axis], roi[axis + 3], label.chunk_shape[axis]) for axis in range(3))
    for low in product(*steps):
        high = [min(a + n, end) for a, n, end in zip(low, label.chunk_shape, roi[3:], strict=True)]
        try:
            voxels = _read_labels(files, (low[0], low[1], low[2], high[0], high[1], high[2]))
        except ValueError:
            unreadable.append([*low, *high])
            continue
        z1, y1, x1, z2, y2, x2 = (a - b for a, b in zip((*low, *high), (*roi[:3], *roi[:3]), strict=True))
        block[z1:z2, y1:y2, x1:x2] = voxels
    return block, unreadable


def _finish(job: ScanJob, journal: ScanJournal, config: DataConfig) -> None:
    """Pack a volume all of whose blocks are measured."""
    for column in job.files:
        if file_stat(getattr(job.row, column)) != job.evidence[column]["stat"]:
            journal.restart(job.scan_id)
            raise ValueError(
                f"{job.row.name}: {column} {getattr(job.row, column)} changed while it was indexed; run it again"
            )
    shape = job.files["image"].shape
    grid = CropGrid(shape[1:], config.crop_size, config.step)
    journal.clear_packed(job.scan_id)
    if job.row.label is None:
        columns = {name: np.zeros(len(grid), COUNT) for name in CROP_COLUMNS}
        columns["ignored_voxels"][:] = prod(grid.extent)
        totals = np.zeros((0, 8), np.int64)
    else:
        totals = _totals(journal.read_part(job.scan_id, number) for number in range(len(job.blocks)))
        if len(totals) >= 2**31:
            raise ValueError(f"{job.row.name}: holds {len(totals)} instances; an index takes fewer than 2**31 a volume")
        columns = _pack_crops(job, journal, grid, totals, config)
    journal.add_packed("instances", ((job.scan_id, *block) for block in _instance_blocks(totals)))
    journal.add_packed(
        "crop_columns",
        (
            (name, job.scan_id, block, values[block * CROPS_PER_BLOCK : (block + 1) * CROPS_PER_BLOCK].tobytes())
            for name, values in columns.items()
            for block in range(-(-len(grid) // CROPS_PER_BLOCK))
        ),
    )
    facts = {
        "intensity": job.intensity,
        "num_instances": len(totals),
        "num_crops": len(grid),
        "unreadable": journal.unreadable(job.scan_id),
        "files": job.evidence,
    }
    journal.finish(job.scan_id, facts)


def _totals(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Rows of the instances of the whole volume, ascending ids."""
    totals = np.zeros((0, 8), np.int64)
    waiting: list[np.ndarray] = []
    num_waiting = 0
    for rows in parts:
        waiting.append(join_instances(rows[rows[:, 0] > 0]))
        num_waiting += len(waiting[-1])
        if num_waiting > max(len(totals), 1 << 20):
            totals, waiting, num_waiting = join_instances(np.concatenate([totals, *waiting])), [], 0
    return join_instances(np.concatenate([totals, *waiting]))


def _pack_crops(
    job: ScanJob, journal: ScanJournal, grid: CropGrid, totals: np.ndarray, config: DataConfig
) -> dict[str, np.ndarray]:
    """Write the instances of every crop; return the columns of the crops."""
    labels, full = totals[:, 0], np.concatenate([[0], totals[:, 1]])
    counts_of_full = full >= max(1, config.min_object_voxels)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in CROP_COLUMNS}
    lists = _ListPacker(job.scan_id, journal)
    per_layer = grid.counts[1] * grid.counts[2]
    parts: list[tuple[int, np.ndarray]] = []  # end along z, rows with ids of the index
    unread = list(range(len(job.blocks)))
    for layer, first_z in enumerate(grid.starts[0].tolist()):
        while unread and job.blocks[unread[0]][0] < first_z + grid.extent[0]:
            number = unread.pop(0)
            parts.append((job.blocks[number][3], _with_ids(journal.read_part(job.scan_id, number), labels)))
        parts = [(end, rows) for end, rows in parts if end > first_z]
        crops = join_crops(np.concatenate([rows for _, rows in parts]), grid, layer)
        is_instance = crops.ids > 0
        columns["ignored_voxels"].append(_sums(crops.crops, crops.voxels * ~is_instance, per_layer))
        columns["foreground_voxels"].append(_sums(crops.crops, crops.voxels * is_instance, per_layer))
        is_fair = (crops.voxels == full[crops.ids]) | (crops.voxels >= config.min_voxels)
        is_fair &= is_instance & counts_of_full[crops.ids]
        columns["num_instances"].append(_sums(crops.crops, is_fair, per_layer))
        visible = np.empty(int(is_instance.sum()), VISIBLE)
        visible["id"], visible["voxels"] = crops.ids[is_instance], crops.voxels[is_instance]
        visible["box"] = crops.boxes[is_instance]
        lists.add(np.bincount(crops.crops[is_instance], minlength=per_layer), visible)
    lists.flush()
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def _with_ids(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rows with the ids of the index, 1..n by rank, in place of those on disk; 0 for ignore."""
    ids = np.searchsorted(labels, rows[:, 0]) + 1
    ids[rows[:, 0] < 0] = 0
    return np.column_stack([ids, rows[:, 1:]])


def _sums(crops: np.ndarray, values: np.ndarray, num_crops: int) -> np.ndarray:
    # Sums of integers below 2**53 are exact in the float64 that bincount computes in.
    return np.bincount(crops, weights=values, minlength=num_crops).astype(COUNT)


class _ListPacker:
    """Cuts the instances of crops, which come layer by layer, into lists of `CROPS_PER_LIST` crops."""

    def __init__(self, scan_id: int, journal: ScanJournal) -> None:
        self._scan_id, self._journal = scan_id, journal
        self._block = 0
        self._counts, self._rows = np.zeros(0, np.int64), np.zeros(0, VISIBLE)

    def add(self, counts: np.ndarray, rows: np.ndarray) -> None:
        self._counts, self._rows = np.concatenate([self._counts, counts]), np.concatenate([self._rows, rows])
        self._write(len(self._counts) // CROPS_PER_LIST)

    def flush(self) -> None:
        self._write(-(-len(self._counts) // CROPS_PER_LIST))

    def _write(self, num_lists: int) -> None:
        ends = np.concatenate([[0], np.cumsum(self._counts)])
        packed = []
        for number in range(num_lists):
            first, stop = number * CROPS_PER_LIST, min((number + 1) * CROPS_PER_LIST, len(self._counts))
            rows = self._rows[ends[first] : ends[stop]]
            if len(rows):
                packed.append((self._scan_id, self._block + number, pack_visible(self._counts[first:stop], rows)))
        self._journal.add_packed("crop_instances", packed)
        written = min(num_lists * CROPS_PER_LIST, len(self._counts))
        self._block += num_lists
        self._counts, self._rows = self._counts[written:], self._rows[ends[written] :]


def _instance_blocks(totals: np.ndarray) -> Iterator[tuple[int, bytes]]:
    table = np.zeros(len(totals), INSTANCE)
    table["label"], table["voxels"], table["box"] = totals[:, 0], totals[:, 1], totals[:, 2:]
    for block in range(-(-len(table) // INSTANCES_PER_BLOCK)):
        yield block, table[block * INSTANCES_PER_BLOCK : (block + 1) * INSTANCES_PER_BLOCK].tobytes()


def _num_voxels(roi: Sequence[int]) -> int:
    return prod(high - low for low, high in zip(roi[:3], roi[3:], strict=True))
