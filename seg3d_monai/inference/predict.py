"""Whole-stack inference: plan, predict block by block into the journal, stitch, paint, publish.

`predict_volume` writes OUTPUT and its table and can be killed at any moment: the same command goes on where it was.
`predict_labels` runs the same steps in memory. This file takes the model as a callable and knows no architecture.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from seg3d_monai.data.volume import ArrayVolume, StoredVolume, open_volume
from seg3d_monai.inference.blocks import Block, BlockPlan, roi_shape, roi_slices
from seg3d_monai.inference.estimate import Estimate, check_memory, estimate_run, peak_memory, read_memory_limit
from seg3d_monai.inference.foreground import foreground_blocks
from seg3d_monai.inference.journal import (
    FINISHED,
    PAINTING,
    PREDICTING,
    PUBLISHING,
    STITCHING,
    Journal,
    JournalInUseError,
    describe_difference,
)
from seg3d_monai.inference.label_tiff import write_label_tiff
from seg3d_monai.inference.paint import Stitched
from seg3d_monai.inference.run import Run
from seg3d_monai.inference.schedule import Workers, stop_on_sigterm
from seg3d_monai.inference.table import FORMATS, write_table
from seg3d_monai.inference.workers import BlockWorker, Predictor, ThreadWorkers
from seg3d_monai.inference.writer import OME_ZARR_VERSIONS, LabelWriter, is_own_output, partial_path

DEFAULT_BLOCK_SIZE = (64, 256, 256)
DEFAULT_HALO = (16, 32, 32)
DTYPES = ("uint32", "uint16")
ZARR_METADATA = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")

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
    level: int = 0,
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
    score_threshold: float | None = None,
    min_volume: int = 0,
    identity: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    progress: bool = True,
) -> Prediction:
    """Segment a whole stack block by block into an OME-Zarr and an object table.

    Beside OUTPUT `X.zarr` it writes `X.instances.parquet` (or .csv) and the journal `X.journal.sqlite`. Called again
    with the same arguments an unfinished run goes on, and a finished one returns at once. SIGTERM ends it after the
    blocks in hand (`Terminated`, exit code 143).

    Args:
        image: path of a stack, a volume, or an array [Z, Y, X] or [C, Z, Y, X].
        predictor: picklable callable (block: float32 Tensor [C, d, h, w] of raw voxels, roi: (z1, y1, x1, z2, y2, x2)
            that was read, volume voxels) -> Instances in the block's frame. If it has `for_volume`,
            `for_volume(volume)` is called once a time point and its result is used; if it has
            `predict_batch(blocks, rois)`, it gets several blocks at once where `batch_size` says so.
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
        level: level of a multiscale image.
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
    tables = _table_formats(table)
    for name, value in (("num_workers", num_workers), ("batch_size", batch_size), ("min_volume", min_volume)):
        least = 0 if name == "min_volume" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}; pass an integer of at least {least}")
    limit = read_memory_limit(max_memory)
    _check_output(output)
    volumes, times = _open_times(image, time, axes=axes, spacing=spacing, channels=channels, level=level)
    volume = volumes[0]
    _check_not_input(output, volume)
    plan = BlockPlan.make(shape=volume.shape[1:], block_size=block_size, halo=halo, roi=roi, times=len(volumes))
    paths = _Paths.of(output, tables, label_tiff)
    facts = _as_json(
        {
            "shape": list(volume.shape),
            "dtype": volume.dtype.name,
            "spacing_um": None if volume.spacing_um is None else [float(s) for s in volume.spacing_um],
            "block_size": list(plan.block_size),
            "halo": list(plan.halo),
            "roi": None if roi is None else list(plan.region),
            "times": times,
            "batch_size": batch_size,
            "foreground": None if foreground is None else _input_identity(_mask(foreground)),
            "skip_empty": skip_empty,
            "skip_below": skip_below,
            "skip_bad": skip_bad,
            "score_threshold": score_threshold,
            "min_volume": min_volume,
            "predictor": _identity_of(predictor) if identity is None else identity,
            "output": {
                "dtype": dtype,
                "table": list(tables),
                "label_tiff": label_tiff,
                "copy_image": copy_image,
                "ome_zarr_version": ome_zarr_version,
                "provenance": provenance or {},
            },
        }
    )
    input_identity = _identity_of_all(volumes)

    stored = _look_at_journal(paths, restart)
    is_repaired = stored is not None and _is_repaired(stored, facts, input_identity, output, plan, volumes)
    if volume.spacing_um is None:
        warnings.warn(
            "the voxel spacing is unknown: sizes in micrometer are null; pass spacing (z, y, x) to set it", stacklevel=2
        )
    if stored is not None and not is_repaired and stored["state"] == FINISHED and paths.are_complete():
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
    if restart:
        paths.remove()
    with Journal(paths.journal) as journal, stop_on_sigterm() as is_stopping:
        if stored is None:
            journal.begin({"plan": facts, "input": input_identity, "state": PREDICTING})
            journal.mark_empty(_empty_blocks(plan, volumes, foreground, skip_empty, skip_below, progress))
        elif is_repaired:
            _log.warning("the input was repaired since a block could not be read; going on with the other blocks")
            journal.forget({"input": input_identity, "state": PREDICTING}, "painted", "tiles")
        is_predicted = journal.fact("state") != PREDICTING or len(journal.finished()) == len(plan)
        predictors = [_not_needed] * len(volumes) if is_predicted else _bound(predictor, volumes)
        make_worker = partial(BlockWorker, plan, volumes, predictors, score_threshold)
        with closing(_workers(make_worker, num_workers, address, gpus_per_worker)) as workers:
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
                difference = describe_difference(input_identity, _identity_of_all(volumes), "input.")
                if difference is not None:
                    raise ValueError(f"the input changed while it was predicted ({difference}); pass --restart")
                journal.set_fact("state", STITCHING)
            num_objects = _publish(run, paths, facts)
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


def relabel_volume(
    output: str | Path,
    *,
    score_threshold: float | None = None,
    min_volume: int | None = None,
    num_workers: int = 1,
    progress: bool = True,
) -> Prediction:
    """Paint a finished OUTPUT again from its journal, with other thresholds and without predicting.

    The old OUTPUT stays until the new one is complete. A run that is killed goes on with the same call; the result is
    that of `predict_volume` with these thresholds.

    Args:
        output: the OME-Zarr that `predict_volume` wrote.
        score_threshold: ignore instances with a lower score; None keeps the threshold as it is.
        min_volume: leave out objects with fewer voxels; None keeps it as it is.
        num_workers: processes that paint.
        progress: show progress bars.

    Raises:
        FileNotFoundError: if the journal does not exist.
        ValueError: if prediction is not finished, or instances below the threshold were never kept.
    """
    paths = _Paths.of(Path(output), (), False)
    if not paths.journal.exists():
        raise FileNotFoundError(f"{paths.journal}: the journal of {output} is gone; predict again")
    with Journal(paths.journal) as journal, stop_on_sigterm() as is_stopping:
        facts = journal.fact("plan")
        if facts is None or journal.fact("state") == PREDICTING:
            raise ValueError(f"{output} is not predicted yet; run `seg3d predict` to the end first")
        new = dict(facts)
        if score_threshold is not None:
            kept = _kept_threshold(facts["predictor"])
            if kept is not None and score_threshold < kept:
                raise ValueError(
                    f"score_threshold is {score_threshold}, but instances below {kept} were not kept when {output} was "
                    f"predicted; give at least {kept}, or predict again with a lower one"
                )
            new["score_threshold"] = score_threshold
        if min_volume is not None:
            new["min_volume"] = min_volume
        paths = _Paths.of(Path(output), facts["output"]["table"], facts["output"]["label_tiff"])
        if new != facts:
            lost = ["census", "links"] if new["score_threshold"] != facts["score_threshold"] else []
            journal.forget({"plan": new, "state": STITCHING}, *lost, "painted", "tiles")
        times = facts["times"] or [0]
        volumes: list[Any] = [None] * len(times)
        if facts["output"]["copy_image"]:
            volumes = [open_volume(paths.output, time=place) for place in range(len(times))]
        plan = BlockPlan.make(
            shape=facts["shape"][1:],
            block_size=facts["block_size"],
            halo=facts["halo"],
            roi=facts["roi"],
            times=len(times),
        )
        make_worker = partial(BlockWorker, plan, volumes, [_not_needed] * len(times), new["score_threshold"])
        with closing(_workers(make_worker, num_workers, None, 0)) as workers:
            run = Run(
                plan=plan,
                journal=journal,
                workers=workers,
                min_score=new["score_threshold"],
                min_volume=new["min_volume"],
                progress=progress,
                is_stopping=is_stopping,
            )
            run.link()
            num_objects = _publish(run, paths, new)
            holes = tuple(journal.unreadable().values())
    return Prediction(paths.output, paths.tables, paths.journal, len(plan), 0, num_objects, holes=holes)


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
    shape = volume.shape[1:]
    plan = BlockPlan.make(
        shape=shape,
        block_size=shape if block_size is None else block_size,
        halo=DEFAULT_HALO if halo is None else halo,
        roi=roi,
        offset=offset,
    )
    worker = BlockWorker(plan, [volume], _bound(predictor, [volume]))
    with Journal(":memory:") as journal, closing(ThreadWorkers(worker)) as workers:
        run = Run(plan=plan, journal=journal, workers=workers, progress=progress)
        run.predict()
        stitched = run.stitch()
        labels = _LabelArray(plan)
        run.paint(stitched, labels)
        (table,) = run.tables(stitched, spacing_um=volume.spacing_um)
    return labels.array, table


class _LabelArray:
    """A target of `Run.paint` in memory."""

    def __init__(self, plan: BlockPlan) -> None:
        self._origin = plan.region[:3]
        self.array = np.zeros(roi_shape(plan.region), dtype=np.uint32)

    def write(self, block: Block, labels: NDArray[np.integer]) -> None:
        self.array[roi_slices(block.owned, self._origin)] = labels


def _kept_threshold(identity: dict[str, Any]) -> float | None:
    """The score below which a predictor, or one that it wraps, keeps nothing."""
    found = [identity.get("score_threshold")]
    found += [_kept_threshold(value) for value in identity.values() if isinstance(value, dict)]
    return max((float(value) for value in found if value is not None), default=None)


def _publish(run: Run, paths: _Paths, facts: dict[str, Any]) -> int:
    """From stitching to the finished OUTPUT; the number of objects."""
    journal, output = run.journal, facts["output"]
    stitched = run.stitch()
    _check_room_for_ids(stitched, output["dtype"])
    holes = [{"owned": list(run.plan[b].owned), "time": run.plan[b].time} for b in journal.unreadable()]
    writer = LabelWriter(
        paths.output,
        run.plan,
        dtype=output["dtype"],
        spacing_um=facts["spacing_um"],
        version=output["ome_zarr_version"],
        facts={"provenance": output["provenance"]} | ({"holes": holes} if holes else {}),
        is_series=facts["times"] is not None,
        image=(facts["shape"][0], facts["dtype"]) if output["copy_image"] else None,
    )
    is_published = journal.fact("state") in (PUBLISHING, FINISHED) and paths.output.exists()
    if writer.partial.exists() or not is_published:
        if journal.fact("state") == STITCHING or not writer.partial.exists():
            journal.forget(
                {"state": STITCHING}, "painted", "tiles"
            )  # a kill while it is made must not look like one after
            writer.create()
            journal.set_fact("state", PAINTING)
        run.paint(stitched, writer)
        if output["copy_image"]:
            run.copy_image(writer)
        run.build_levels(writer)
    if paths.label_tiff is not None:
        write_label_tiff(writer.path, paths.label_tiff, spacing_um=facts["spacing_um"], progress=run.progress)
    for path in paths.tables:
        write_table(run.tables(stitched, spacing_um=facts["spacing_um"], times=facts["times"]), path)
    journal.set_fact("num_objects", stitched.num_objects)
    journal.set_fact("state", PUBLISHING)
    if writer.partial.exists():
        writer.publish()
    journal.begin({"state": FINISHED, "is_published": True})
    return stitched.num_objects


@dataclass(frozen=True)
class _Paths:
    """What a run writes."""

    output: Path
    partial: Path
    journal: Path
    tables: tuple[Path, ...]
    label_tiff: Path | None

    @classmethod
    def of(cls, output: Path, tables: Sequence[str], label_tiff: bool) -> _Paths:
        return cls(
            output=output,
            partial=partial_path(output),
            journal=output.with_suffix(".journal.sqlite"),
            tables=tuple(output.with_suffix(f".instances.{table}") for table in tables),
            label_tiff=output.with_suffix(".labels.tif") if label_tiff else None,
        )

    def results(self) -> list[Path]:
        return [self.output, *self.tables, *([] if self.label_tiff is None else [self.label_tiff])]

    def are_complete(self) -> bool:
        return all(path.exists() for path in self.results()) and not self.partial.exists()

    def remove(self) -> None:
        self.journal.unlink(missing_ok=True)
        self.journal.with_name(self.journal.name + "-journal").unlink(missing_ok=True)
        for path in (*self.results(), self.partial):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _not_needed(block: torch.Tensor, roi: Sequence[int]) -> Any:
    """Stands for the predictor where all blocks are predicted."""
    raise AssertionError("a block is predicted again")


def _bound(predictor: Any, volumes: Sequence[Any]) -> list[Predictor]:
    """The predictor of each time point."""
    if hasattr(predictor, "for_volume"):
        return [predictor.for_volume(volume) for volume in volumes]
    return [predictor] * len(volumes)


def _workers(make_worker: Callable[[], BlockWorker], num_workers: int, address: str | None, gpus: float) -> Workers:
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
    mask = None if foreground is None else _mask(foreground)
    below = -np.inf if skip_below is None and not skip_empty else skip_below
    of_time = replace(plan, times=1)
    parts = [foreground_blocks(of_time, volume, mask=mask, skip_below=below, progress=progress) for volume in volumes]
    return [int(index) for index in np.flatnonzero(~np.concatenate(parts))]


def _mask(foreground: Any) -> Any:
    if isinstance(foreground, np.ndarray):
        return ArrayVolume(foreground)
    return open_volume(foreground) if isinstance(foreground, (str, os.PathLike)) else foreground


def _open_times(image: Any, time: int | Sequence[int] | str, **options: Any) -> tuple[list[Any], list[int] | None]:
    """A volume for each time point, and their numbers if the output is to be a series."""
    if isinstance(time, int):
        return [_open(image, time=time, **options)], None
    if not isinstance(image, (str, os.PathLike)):
        raise ValueError(f"time is {time!r}, which describes a file; open the volumes yourself")
    if isinstance(time, str):
        if time != "all":
            raise ValueError(f"time is {time!r}; pass a number, a list of numbers or 'all'")
        time = range(StoredVolume(Path(image), time=0, **options).num_times)
    if not len(time):
        raise ValueError("time is empty; name at least one time point")
    return [_open(image, time=t, **options) for t in time], [int(t) for t in time]


def _open(image: Any, **options: Any) -> Any:
    if isinstance(image, (str, os.PathLike)):
        return open_volume(Path(image), **options)
    spacing = options.pop("spacing")
    if isinstance(image, np.ndarray):
        image, given = ArrayVolume(image, spacing), False
    else:
        given = spacing is not None
    if given or options != {"axes": None, "channels": None, "time": 0, "level": 0}:
        raise ValueError("axes, spacing, channels, time and level describe a file; open the volume with them instead")
    return image


def _input_identity(volume: Any) -> dict[str, Any]:
    """What tells that the input is still the same: its own identity, and when its files were written."""
    path = getattr(volume, "path", None)
    return dict(volume.identity()) | {"modified": None if path is None else _modified(Path(path))}


def _identity_of_all(volumes: Sequence[Any]) -> dict[str, Any]:
    identities = [_input_identity(volume) for volume in volumes]
    return _as_json(identities[0] if len(volumes) == 1 else {f"volume {i}": v for i, v in enumerate(identities)})


def _modified(path: Path) -> str:
    """When a file, or the metadata and folders at the top of a Zarr, were last written; ISO 8601, UTC."""
    files = [path]
    if path.is_dir():
        files += [entry for entry in path.iterdir() if entry.is_dir() or entry.name in ZARR_METADATA]
        files += [entry for folder in files[1:] if folder.is_dir() for entry in folder.iterdir() if entry.is_dir()]
    latest = max(file.stat().st_mtime_ns for file in files)
    second = datetime.fromtimestamp(latest // 10**9, tz=UTC)
    return f"{second:%Y-%m-%dT%H:%M:%S}.{latest % 10**9:09d}Z"


def _look_at_journal(paths: _Paths, restart: bool) -> dict[str, Any] | None:
    """What the journal says, or None if a new run may begin."""
    if restart:
        if paths.journal.exists():
            try:
                Journal(paths.journal).close()
            except JournalInUseError:
                raise
            except ValueError:
                _log.warning("%s is not a usable journal and will be replaced", paths.journal)
        if paths.output.exists() and not is_own_output(paths.output):
            raise ValueError(f"{paths.output} exists and was not written by seg3d predict; choose another OUTPUT")
        return None
    if paths.journal.exists():
        with Journal(paths.journal) as journal:
            if journal.fact("plan") is not None:
                names = ("plan", "input", "state", "num_objects", "is_published")
                stored = {name: journal.fact(name) for name in names}
                if paths.output.exists() and stored["state"] == PREDICTING and not stored["is_published"]:
                    raise ValueError(
                        f"{paths.output} exists but the run in {paths.journal} did not write it; pass --restart"
                    )
                return stored | {"holes": journal.unreadable()}
    for found in paths.results():
        if found.exists():
            raise ValueError(f"{found} exists without the journal of its run; choose another OUTPUT or pass --restart")
    return None


def _is_repaired(
    stored: dict[str, Any],
    facts: dict[str, Any],
    input_identity: dict[str, Any],
    output: Path,
    plan: BlockPlan,
    volumes: Sequence[Any],
) -> bool:
    """Whether the input was repaired after a failed reading; refuses every other difference."""
    begun = "finished" if stored["state"] == FINISHED else "begun"
    difference = describe_difference(stored["plan"], facts)
    if difference is None:
        difference = describe_difference(stored["input"], input_identity, "input.")
        if stored["holes"] and difference is not None:
            return True
        if difference is None:
            # The identity is of a sample: a repaired chunk elsewhere shows only when it is read.
            return stored["state"] != PREDICTING and any(_is_readable(plan[b], volumes) for b in stored["holes"])
    raise ValueError(f"{output} was {begun} with another plan ({difference}); pass --restart to start anew")


def _is_readable(block: Block, volumes: Sequence[Any]) -> bool:
    try:
        volumes[block.time].read(block.read)
    except Exception:  # of any reader
        return False
    return True


def _table_formats(table: str | Sequence[str]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in table.split(",")) if isinstance(table, str) else tuple(table)
    for name in names or ("",):
        _check_choice("table", name, FORMATS)
    return tuple(dict.fromkeys(names))


def _check_output(output: Path) -> None:
    if output.suffix != ".zarr":
        raise ValueError(f"output is {str(output)!r}; give a name that ends with .zarr")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"the folder of output {output} does not exist; make {output.parent} first")
    try:
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"output {output} cannot be written: {error.strerror}; choose a folder that you may write to"
        ) from error


def _check_not_input(output: Path, volume: Any) -> None:
    if volume.path is None:
        return
    source, target = Path(volume.path).resolve(), output.resolve()
    if target == source or target in source.parents or source in target.parents:
        raise ValueError(f"output {output} and the input {volume.path} overlap; choose another OUTPUT")


def _check_room_for_ids(stitched: Stitched, dtype: str) -> None:
    room = int(np.iinfo(dtype).max) - 1  # the maximum means "ignore" in label volumes
    if stitched.num_objects > room:
        raise ValueError(f"{stitched.num_objects} objects do not fit dtype {dtype} ({room} ids); pass dtype uint32")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose {' or '.join(choices)}")


def _identity_of(predictor: Any) -> dict[str, Any]:
    if hasattr(predictor, "identity"):
        return dict(predictor.identity())
    kind = predictor if hasattr(predictor, "__qualname__") else type(predictor)
    return {"type": f"{kind.__module__}.{kind.__qualname__}"}


def _as_json(facts: dict[str, Any]) -> dict[str, Any]:
    """The same facts as they will be read back from the journal."""
    return dict(json.loads(json.dumps(facts, sort_keys=True)))
