"""Whole-stack inference: plan, predict block by block into the journal, stitch, paint, publish.

`predict_volume` writes OUTPUT and its table and can be killed at any moment: the same command goes on where it was.
`predict_labels` runs the same steps in memory. This file takes the model as a callable and knows no architecture; what
may be resumed is decided in resume.py, how input and OUTPUT look on disk is for inputs.py and publish.py.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from seg3d_monai.data.memory_limit import read_memory_limit
from seg3d_monai.data.volume import ArrayVolume
from seg3d_monai.inference.blocks import Block, BlockPlan, roi_shape, roi_slices
from seg3d_monai.inference.estimate import Estimate, check_memory, estimate_run, peak_memory
from seg3d_monai.inference.foreground import foreground_blocks
from seg3d_monai.inference.inputs import (
    as_json,
    identity_of_all,
    open_input,
    open_times,
    predictor_identity,
    volume_identity,
)
from seg3d_monai.inference.journal import FINISHED, PREDICTING, STITCHING, Journal, describe_difference
from seg3d_monai.inference.publish import publish
from seg3d_monai.inference.resume import (
    OutputPaths,
    check_not_input,
    check_output,
    input_was_repaired,
    no_trace_of_mistakes,
    read_stored_run,
)
from seg3d_monai.inference.run import Run
from seg3d_monai.inference.schedule import stop_on_sigterm
from seg3d_monai.inference.table import FORMATS
from seg3d_monai.inference.workers import BlockWorker, Predictor, ThreadWorkers, no_predictor, start_workers
from seg3d_monai.inference.writer import OME_ZARR_VERSIONS

DEFAULT_BLOCK_SIZE = (64, 256, 256)
DEFAULT_HALO = (16, 32, 32)
DTYPES = ("uint32", "uint16")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """What `predict_volume` did.

    Attributes:
        output: the OME-Zarr.
        tables: the object tables.
        journal: the journal.
        num_blocks: blocks of the plan.
        num_predicted: blocks predicted by this call; the others were in the journal or hold nothing.
        num_objects: objects in OUTPUT, or None after a dry run.
        already_finished: OUTPUT was complete and identical; nothing was done.
        holes: blocks that could not be read, and why.
        estimate: what a dry run expects.
    """

    output: Path
    tables: tuple[Path, ...]
    journal: Path
    num_blocks: int
    num_predicted: int
    num_objects: int | None
    already_finished: bool = False
    holes: tuple[str, ...] = ()
    estimate: Estimate | None = None

    @property
    def table(self) -> Path:
        """The first of the object tables."""
        return self.tables[0]

    def __str__(self) -> str:
        if self.estimate is not None:
            return f"dry run, nothing written: {self.estimate}"
        done = f"{self.num_objects} objects in {self.output}, table {', '.join(map(str, self.tables))}"
        if self.holes:
            done += f"; {len(self.holes)} blocks could not be read and are holes"
        if self.already_finished:
            return f"already finished, nothing to do: {done}"
        return f"{done}; {self.num_predicted} of {self.num_blocks} blocks predicted now"


def predict_volume(
    image: Any,
    predictor: Predictor,
    output: str | Path,
    block_size: int | Sequence[int] = DEFAULT_BLOCK_SIZE,
    halo: int | Sequence[int] = DEFAULT_HALO,
    num_workers: int = 1,
    *,
    axes: str | None = None,
    spacing: Sequence[float] | None = None,
    channels: Sequence[int] | int | None = None,
    time: int | Sequence[int] | str = 0,
    level: int | str = 0,
    roi: Sequence[int] | None = None,
    foreground: Any = None,
    skip_empty: bool = False,
    skip_below: float | Sequence[float] | None = None,
    batch_size: int = 1,
    skip_bad: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    max_memory: str | float | None = None,
    address: str | None = None,
    gpus_per_worker: float = 0,
    dtype: str = "uint32",
    table: str | Sequence[str] = "parquet",
    label_tiff: bool = False,
    copy_image: bool = False,
    ome_zarr_version: str = "0.5",
    shards: bool | None = None,
    score_threshold: float | None = None,
    min_volume: int = 0,
    identity: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    progress: bool = True,
) -> Prediction:
    """Segment a whole stack block by block into an OME-Zarr and an object table.

    Beside OUTPUT `X.zarr` it writes `X.instances.parquet` (or .csv) and the journal `X.journal.sqlite`. Called again
    with the same arguments an unfinished run goes on, and a finished one returns at once; with another
    `score_threshold` or `min_volume` alone, what was predicted is painted again. SIGTERM ends it after the blocks in
    hand (`Terminated`, exit code 143).

    Args:
        image: path of a stack, a volume, or an array [Z, Y, X] or [C, Z, Y, X].
        predictor: picklable callable (block: float32 Tensor [C, d, h, w] of raw voxels, roi: (z1, y1, x1, z2, y2, x2)
            that was read, volume voxels) -> Instances in the block's frame. If it has `for_volume`,
            `for_volume(volume)` is called once a time point and its result is used; a run that goes on calls
            `rebind(volume, binding)` instead, with the JSON-able `binding()` of that result, if it has these; if it has
            `predict_batch(blocks, rois)`, it gets several blocks at once where `batch_size` says so; if it has
            `step_in(volume)`, voxels (z, y, x) of the volume per voxel that it works in, block_size and halo count the
            latter.
        output: where to write, `*.zarr`, in an existing folder.
        block_size: int or (z, y, x) voxels that a block owns.
        halo: int or (z, y, x) voxels that it reads beyond them on every side; about an object's diameter is best,
            at least 1 where there is more than one block.
        num_workers: processes that predict; more than 1 are run by Ray and need a picklable predictor.
        axes: axes of the stored array, if its metadata do not say; for paths only, as the next four.
        spacing: (z, y, x) micrometer per voxel; overrides the metadata.
        channels: channels to read.
        time: time point to read; several, or "all", make OUTPUT a series, in which every time point is a stack of its
            own and ids go on counting.
        level: level of a multiscale image: its number, name or voxel size, as `open_volume` takes it.
        roi: (z1, y1, x1, z2, y2, x2) to predict, volume voxels; OUTPUT keeps the volume's shape and frame.
        foreground: path, volume or array of a mask on any grid over the same extent: blocks that read nothing of it
            are not predicted.
        skip_empty: do not predict blocks that read one grey value only, with which stitched stacks are filled up.
        skip_below: grey value, or one a channel: blocks that read no voxel above it are not predicted either.
        batch_size: blocks that the network takes together; part of the plan, since it may change bits.
        skip_bad: leave a hole where a block cannot be read, and list it in OUTPUT, instead of stopping there.
        restart: forget what was begun or finished under this name and start anew.
        dry_run: check everything, predict one block, say what the run would take, write nothing.
        max_memory: refuse a run whose peak of memory is expected above this; bytes, or text such as "8GB".
        address: of a Ray cluster, "auto" or host:port; None starts Ray on this machine if it is needed.
        gpus_per_worker: GPUs that a Ray worker asks for.
        dtype: "uint32" or "uint16" label ids.
        table: "parquet", "csv", or both.
        label_tiff: also write the labels as `X.labels.tif`.
        copy_image: copy the input into OUTPUT.
        ome_zarr_version: "0.5" or "0.4".
        shards: keep the chunks of a block in one file; None does so where the version can, which 0.4 cannot.
        score_threshold: ignore instances with a lower score; None keeps all.
        min_volume: leave out objects with fewer voxels.
        identity: JSON-able facts that tell predictors apart (a changed one is refused on resuming); default: the result
            of `predictor.identity()` if it has that, else its type.
        provenance: JSON-able facts to keep in OUTPUT.
        progress: show progress bars.

    Returns:
        What was done and where it lies.

    Raises:
        FileNotFoundError: if the input or OUTPUT's folder does not exist.
        ValueError: if an argument is out of range, OUTPUT exists and is not this run's, the journal holds another plan,
            the input holds NaN, cannot be read or changes meanwhile, more memory is needed than `max_memory`, or the
            predictor returns invalid instances. Blocks that were finished stay in the journal.
        TypeError: if an argument has the wrong type or the predictor does not return Instances.
        OSError: if the disk is full; the same command goes on.
        Terminated: after SIGTERM.
    """
    output = Path(output)
    _check_choice("dtype", dtype, DTYPES)
    _check_choice("ome_zarr_version", ome_zarr_version, OME_ZARR_VERSIONS)
    if shards not in (None, True, False):
        raise ValueError(f"shards is {shards!r}; pass True, False or None")
    if shards and ome_zarr_version == "0.4":
        raise ValueError("shards is True, and OME-Zarr 0.4 has none; pass ome_zarr_version 0.5, or shards False")
    tables = _table_formats(table)
    for name, value in (("num_workers", num_workers), ("batch_size", batch_size), ("min_volume", min_volume)):
        least = 0 if name == "min_volume" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}; pass an integer of at least {least}")
    limit = read_memory_limit(max_memory)
    check_output(output)
    volumes, times = open_times(image, time, axes=axes, spacing=spacing, channels=channels, level=level)
    volume = volumes[0]
    check_not_input(output, volume)
    plan = plan_blocks(volume, predictor, block_size, halo, roi=roi, times=len(volumes))
    paths = OutputPaths.of(output, tables, label_tiff)
    facts = as_json(
        {
            "shape": list(volume.shape),
            "dtype": volume.dtype.name,
            "spacing_um": None if volume.spacing_um is None else [float(s) for s in volume.spacing_um],
            "block_size": list(plan.block_size),
            "halo": list(plan.halo),
            "roi": None if roi is None else list(plan.region),
            "times": times,
            "batch_size": batch_size,
            "foreground": None if foreground is None else volume_identity(open_input(foreground)),
            "skip_empty": skip_empty,
            "skip_below": skip_below,
            "score_threshold": score_threshold,
            "min_volume": min_volume,
            "predictor": predictor_identity(predictor) if identity is None else identity,
            "output": {
                "dtype": dtype,
                "table": list(tables),
                "label_tiff": label_tiff,
                "copy_image": copy_image,
                "ome_zarr_version": ome_zarr_version,
                "shards": ome_zarr_version != "0.4" if shards is None else shards,
                "provenance": provenance or {},
            },
        }
    )
    input_identity = identity_of_all(volumes)

    stored = read_stored_run(paths, restart)
    is_repaired = stored is not None and input_was_repaired(stored, facts, input_identity, output, plan, volumes)
    if volume.spacing_um is None:
        warnings.warn(
            "the voxel spacing is unknown: sizes in micrometer are null; pass spacing (z, y, x) to set it", stacklevel=2
        )
    is_same = stored is not None and not is_repaired and stored["plan"] == facts
    if stored is not None and is_same and stored["state"] == FINISHED and paths.are_complete():
        _log.info("%s is finished; nothing to do", output)
        return Prediction(
            output,
            paths.tables,
            paths.journal,
            len(plan),
            0,
            stored["num_objects"],
            already_finished=True,
            holes=tuple(stored["holes"].values()),
        )
    if dry_run:
        num_empty = len(_empty_blocks(plan, volumes, foreground, skip_empty, skip_below, progress))
        estimate = estimate_run(plan, volumes, _bound(predictor, volumes), score_threshold, num_workers, num_empty)
        check_memory(estimate.memory, limit)
        return Prediction(output, paths.tables, paths.journal, len(plan), 0, None, estimate=estimate)
    if stored is None:
        paths.remove()
    with (
        Journal(paths.journal) as journal,
        no_trace_of_mistakes(journal, paths.journal, is_new=stored is None),
        stop_on_sigterm() as is_stopping,
    ):
        if stored is None:
            empty = _empty_blocks(plan, volumes, foreground, skip_empty, skip_below, progress)
            with journal.transaction():
                journal.begin({"plan": facts, "input": input_identity, "state": PREDICTING})
                journal.mark_empty(empty)
        elif is_repaired:
            _log.warning("the input was repaired since a block could not be read; going on with the other blocks")
            journal.forget({"input": input_identity, "state": PREDICTING}, "painted", "tiles")
        if stored is not None and stored["plan"] != facts:
            difference = describe_difference(stored["plan"], facts)
            _log.info("%s had other thresholds (%s); going on with these from the journal", output, difference)
            journal.change_thresholds(facts)
        is_predicted = journal.fact("state") != PREDICTING or len(journal.finished()) == len(plan)
        predictors = [no_predictor] * len(volumes) if is_predicted else _bound(predictor, volumes, journal)
        make_worker = partial(BlockWorker, plan, volumes, predictors, score_threshold)
        with closing(start_workers(make_worker, num_workers, address, gpus_per_worker)) as workers:
            run = Run(
                plan=plan,
                journal=journal,
                workers=workers,
                min_score=score_threshold,
                min_volume=min_volume,
                batch_size=batch_size,
                skip_bad=skip_bad,
                progress=progress,
                is_stopping=is_stopping,
            )
            num_predicted = 0
            if journal.fact("state") == PREDICTING:
                state_memory = partial(_state_memory, plan, volume, limit)
                num_predicted = run.predict(state_memory)
                difference = describe_difference(input_identity, identity_of_all(volumes), "input.")
                if difference is not None:
                    raise ValueError(f"the input changed while it was predicted ({difference}); pass --restart")
                journal.set_fact("state", STITCHING)
            else:
                run.link()  # if that was left undone after a change of thresholds
            num_objects = publish(run, paths, facts)
            holes = tuple(journal.unreadable().values())
    return Prediction(
        output,
        paths.tables,
        paths.journal,
        len(plan),
        num_predicted,
        num_objects,
        holes=holes,
    )


def predict_labels(
    volume: Any,
    predictor: Predictor,
    block_size: int | Sequence[int] | None = None,
    halo: int | Sequence[int] | None = None,
    progress: bool = False,
    *,
    roi: Sequence[int] | None = None,
    offset: int | Sequence[int] = 0,
) -> tuple[NDArray[np.uint32], pd.DataFrame]:
    """Segment a volume in memory; the same blocks and stitching as `predict_volume`.

    Args:
        volume: a volume, or an array [Z, Y, X] or [C, Z, Y, X].
        predictor: as in `predict_volume`.
        block_size: int or (z, y, x) voxels; None predicts the volume in one block.
        halo: int or (z, y, x) voxels; None is `DEFAULT_HALO`.
        progress: show progress bars.
        roi: (z1, y1, x1, z2, y2, x2) to predict, volume voxels; None for all.
        offset: int or (z, y, x) voxels by which the grid of blocks is moved.

    Returns:
        (labels uint32 [Z, Y, X] of the volume, or of the ROI; object table, in voxels of the volume).

    Raises:
        ValueError: if an argument is out of range, the volume holds NaN, or the predictor returns invalid instances.
    """
    volume = ArrayVolume(volume) if isinstance(volume, np.ndarray) else volume
    plan = plan_blocks(volume, predictor, block_size, halo, roi=roi, offset=offset)
    return predict_plan(plan, volume, predictor, progress)


def plan_blocks(
    volume: Any,
    predictor: Predictor,
    block_size: int | Sequence[int] | None,
    halo: int | Sequence[int] | None,
    **options: Any,
) -> BlockPlan:
    """The blocks of a volume, whose sizes are given in voxels as the predictor sees them.

    Args:
        volume: a volume.
        predictor: as in `predict_volume`.
        block_size: int or (z, y, x) voxels; None takes the volume as one block.
        halo: int or (z, y, x) voxels; None is `DEFAULT_HALO`.
        options: further ones of `BlockPlan.make`.

    Raises:
        ValueError, TypeError: as `BlockPlan.make` and the predictor's `step_in`.
    """
    halo = DEFAULT_HALO if halo is None else halo
    if block_size is None:
        return BlockPlan.make(shape=volume.shape[1:], block_size=volume.shape[1:], halo=halo, **options)
    step = predictor.step_in(volume) if hasattr(predictor, "step_in") else (1, 1, 1)
    return BlockPlan.make(shape=volume.shape[1:], block_size=block_size, halo=halo, step=step, **options)


def predict_plan(
    plan: BlockPlan, volume: Any, predictor: Predictor, progress: bool = False
) -> tuple[NDArray[np.uint32], pd.DataFrame]:
    """`predict_labels` with blocks that are planned already."""
    worker = BlockWorker(plan, [volume], _bound(predictor, [volume]))
    with Journal(":memory:") as journal, closing(ThreadWorkers(worker)) as workers:
        run = Run(plan=plan, journal=journal, workers=workers, progress=progress)
        run.predict()
        stitched = run.stitch()
        labels = _LabelArray(plan)
        run.paint(stitched, labels)
        tables = run.count(stitched).tables(
            scores=stitched.scores, classes=stitched.classes, spacing_um=volume.spacing_um
        )
        table = pd.concat(tables, ignore_index=True)
    return labels.array, table


class _LabelArray:
    """A target of `Run.paint` in memory."""

    def __init__(self, plan: BlockPlan) -> None:
        self._origin = plan.region[:3]
        self.array = np.zeros(roi_shape(plan.region), dtype=np.uint32)

    def write(self, block: Block, labels: NDArray[np.integer]) -> None:
        self.array[roi_slices(block.owned, self._origin)] = labels


def _bound(predictor: Any, volumes: Sequence[Any], journal: Journal | None = None) -> list[Predictor]:
    """The predictor of each time point; what it measures of the volume is measured once and kept in the journal."""
    if not hasattr(predictor, "for_volume"):
        return [predictor] * len(volumes)
    kept = None if journal is None or not hasattr(predictor, "rebind") else journal.fact("bindings")
    if kept is not None:
        return [predictor.rebind(volume, binding) for volume, binding in zip(volumes, kept, strict=True)]
    bound = [predictor.for_volume(volume) for volume in volumes]
    if journal is not None and hasattr(predictor, "rebind"):
        journal.set_fact("bindings", [one.binding() for one in bound])
    return bound


def _state_memory(plan: BlockPlan, volume: Any, limit: int | None, peak_of_a_block: int, num_instances: int) -> None:
    """Say after the first block what the run will take."""
    expected = peak_memory(plan, volume, peak_of_a_block, num_instances * len(plan))
    check_memory(expected, limit)
    _log.info("peak of memory: about %.1f GB a process", expected / 1e9)


def _empty_blocks(
    plan: BlockPlan, volumes: Sequence[Any], foreground: Any, skip_empty: bool, skip_below: Any, progress: bool
) -> list[int]:
    """Blocks that need no prediction."""
    if foreground is None and not skip_empty and skip_below is None:
        return []
    mask = None if foreground is None else open_input(foreground)
    below = -np.inf if skip_below is None and not skip_empty else skip_below
    of_time = replace(plan, times=1)
    parts = [foreground_blocks(of_time, volume, mask=mask, skip_below=below, progress=progress) for volume in volumes]
    return [int(index) for index in np.flatnonzero(~np.concatenate(parts))]


def _table_formats(table: str | Sequence[str]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in table.split(",")) if isinstance(table, str) else tuple(table)
    for name in names or ("",):
        _check_choice("table", name, FORMATS)
    return tuple(dict.fromkeys(names))


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose {' or '.join(choices)}")
