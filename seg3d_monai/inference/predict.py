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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from seg3d_monai.data.intensity import check_finite
from seg3d_monai.data.volume import ArrayVolume, open_volume
from seg3d_monai.inference.blocks import BlockPlan, roi_slices
from seg3d_monai.inference.journal import (
    FINISHED,
    PREDICTING,
    PUBLISHING,
    Journal,
    JournalInUseError,
    describe_difference,
)
from seg3d_monai.inference.paint import Stitched, stitch_blocks
from seg3d_monai.inference.table import ObjectCounter, write_table
from seg3d_monai.inference.workers import Predictor, UnreadableBlockError, predict_blocks
from seg3d_monai.inference.writer import OME_ZARR_VERSIONS, LabelWriter, is_own_output, partial_path

DEFAULT_BLOCK_SIZE = (64, 256, 256)
DEFAULT_HALO = (16, 32, 32)
DTYPES = ("uint32", "uint16")
TABLES = ("parquet", "csv")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """What `predict_volume` did.

    Attributes:
        output: the OME-Zarr.
        table: the object table.
        journal: the journal.
        num_blocks: blocks of the plan.
        num_predicted: blocks predicted by this call; the others were in the journal.
        num_objects: objects in OUTPUT, or None after a dry run.
        already_finished: OUTPUT was complete and identical; nothing was done.
    """

    output: Path
    table: Path
    journal: Path
    num_blocks: int
    num_predicted: int
    num_objects: int | None
    already_finished: bool

    def __str__(self) -> str:
        if self.num_objects is None:
            return f"dry run: {self.num_blocks} blocks, nothing written"
        done = f"{self.num_objects} objects in {self.output}, table {self.table}"
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
    time: int = 0,
    level: int = 0,
    restart: bool = False,
    dry_run: bool = False,
    dtype: str = "uint32",
    table: str = "parquet",
    copy_image: bool = False,
    ome_zarr_version: str = "0.5",
    score_threshold: float | None = None,
    identity: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    progress: bool = True,
) -> Prediction:
    """Segment a whole stack block by block into an OME-Zarr and an object table.

    Beside OUTPUT `X.zarr` it writes `X.instances.parquet` (or .csv) and the journal `X.journal.sqlite`. Called again
    with the same arguments an unfinished run goes on, and a finished one returns at once.

    Args:
        image: path of a stack, a volume, or an array [Z, Y, X] or [C, Z, Y, X].
        predictor: picklable callable (block: float32 Tensor [C, d, h, w] of raw voxels, roi: (z1, y1, x1, z2, y2, x2)
            that was read, volume voxels) -> Instances in the block's frame. If it has `for_volume`,
            `for_volume(volume)` is called once and its result is used.
        output: where to write, `*.zarr`, in an existing folder.
        block_size: int or (z, y, x) voxels that a block owns.
        halo: int or (z, y, x) voxels that it reads beyond them on every side; about an object's diameter is best,
            at least 1 where there is more than one block.
        num_workers: processes that predict; more than 1 need a picklable predictor.
        axes: axes of the stored array, if its metadata do not say; for paths only, as the next four.
        spacing: (z, y, x) micrometer per voxel; overrides the metadata.
        channels: channels to read.
        time: time point to read.
        level: level of a multiscale image.
        restart: forget what was begun or finished under this name and start anew.
        dry_run: check everything, write nothing.
        dtype: "uint32" or "uint16" label ids.
        table: "parquet" or "csv".
        copy_image: copy the input into OUTPUT.
        ome_zarr_version: "0.5" or "0.4".
        score_threshold: ignore instances with a lower score; None keeps all.
        identity: JSON-able facts that tell predictors apart (a changed one is refused on resuming); default: the result
            of `predictor.identity()` if it has that, else its type.
        provenance: JSON-able facts to keep in OUTPUT.
        progress: show progress bars.

    Returns:
        What was done and where it lies.

    Raises:
        FileNotFoundError: if the input or OUTPUT's folder does not exist.
        ValueError: if an argument is out of range, OUTPUT exists and is not this run's, the journal holds another plan,
            the input holds NaN or cannot be read, or the predictor returns invalid instances. Blocks that were finished
            stay in the journal.
        TypeError: if an argument has the wrong type or the predictor does not return Instances.
    """
    output = Path(output)
    _check_choice("dtype", dtype, DTYPES)
    _check_choice("table", table, TABLES)
    _check_choice("ome_zarr_version", ome_zarr_version, OME_ZARR_VERSIONS)
    if isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 1:
        raise ValueError(f"num_workers is {num_workers!r}; pass an integer of at least 1")
    _check_output(output)
    volume = _open(image, axes=axes, spacing=spacing, channels=channels, time=time, level=level)
    _check_not_input(output, volume)
    plan = BlockPlan.make(shape=volume.shape[1:], block_size=block_size, halo=halo)
    table_path = output.with_suffix(f".instances.{table}")
    journal_path = output.with_suffix(".journal.sqlite")
    facts = {
        "shape": list(volume.shape),
        "spacing_um": None if volume.spacing_um is None else [float(s) for s in volume.spacing_um],
        "block_size": list(plan.block_size),
        "halo": list(plan.halo),
        "score_threshold": score_threshold,
        "predictor": _identity_of(predictor) if identity is None else identity,
        "output": {
            "dtype": dtype,
            "table": table,
            "copy_image": copy_image,
            "ome_zarr_version": ome_zarr_version,
            "provenance": provenance or {},
        },
    }
    facts = _as_json(facts)
    input_identity = _as_json(volume.identity())

    stored = _look_at_journal(journal_path, output, table_path, restart)
    if stored is not None:
        accepted = _check_same_plan(stored, facts, input_identity, output)
        if stored["state"] in (PUBLISHING, FINISHED) and output.exists() and table_path.exists():
            if not dry_run and stored["state"] == PUBLISHING:
                with Journal(journal_path) as journal:
                    journal.set_fact("state", FINISHED)
            _log.info("%s is finished; nothing to do", output)
            return Prediction(output, table_path, journal_path, len(plan), 0, stored["num_objects"], True)
        if stored["state"] == PREDICTING and output.exists():
            raise ValueError(f"{output} exists but the run in {journal_path} did not write it; pass --restart")
    if stored is None:
        check_finite(volume)
    if volume.spacing_um is None:
        warnings.warn(
            "the voxel spacing is unknown: sizes in micrometer are null; pass spacing (z, y, x) to set it", stacklevel=2
        )
    if dry_run:
        return Prediction(output, table_path, journal_path, len(plan), 0, None, False)
    if restart:
        _remove(journal_path, output, table_path)
    with Journal(journal_path) as journal:
        if stored is None:
            journal.begin({"plan": facts, "input": input_identity, "state": PREDICTING})
        elif not accepted:
            _log.warning("the input was repaired since a block could not be read; going on with the other blocks")
            journal.set_fact("input", input_identity)
        num_predicted = _predict_missing(plan, volume, predictor, journal, num_workers=num_workers, progress=progress)
        stitched = stitch_blocks(plan, journal, min_score=score_threshold, progress=progress)
        _check_room_for_ids(stitched, dtype)
        writer = LabelWriter(
            output,
            plan,
            dtype=dtype,
            spacing_um=volume.spacing_um,
            version=ome_zarr_version,
            provenance=provenance or {},
        )
        counter = ObjectCounter(stitched.num_objects)
        for block in tqdm(plan, total=len(plan), desc="paint", unit="block", disable=not progress):
            labels = stitched.paint(block.index)
            counter.add(labels, block.owned)
            writer.write(block.owned, labels)
        if copy_image:
            writer.copy_image(volume, progress=progress)
        writer.finish(progress=progress)
        rows = counter.table(
            scores=stitched.scores, classes=stitched.classes, shape=plan.shape, spacing_um=volume.spacing_um
        )
        journal.set_fact("num_objects", stitched.num_objects)
        journal.set_fact("state", PUBLISHING)  # from here on an OUTPUT is this run's
        write_table(rows, table_path)
        writer.publish()
        journal.set_fact("state", FINISHED)
    return Prediction(output, table_path, journal_path, len(plan), num_predicted, stitched.num_objects, False)


def predict_labels(
    volume: Any,
    predictor: Predictor,
    block_size: int | Sequence[int] | None = None,
    halo: int | Sequence[int] | None = None,
    progress: bool = False,
) -> tuple[NDArray[np.uint32], pd.DataFrame]:
    """Segment a volume in memory; the same blocks and stitching as `predict_volume`.

    Args:
        volume: a volume, or an array [Z, Y, X] or [C, Z, Y, X].
        predictor: as in `predict_volume`.
        block_size: int or (z, y, x) voxels; None predicts the volume in one block.
        halo: int or (z, y, x) voxels; None is `DEFAULT_HALO`.
        progress: show progress bars.

    Returns:
        (labels [Z, Y, X] uint32, object table).

    Raises:
        ValueError: if an argument is out of range, the volume holds NaN, or the predictor returns invalid instances.
    """
    volume = ArrayVolume(volume) if isinstance(volume, np.ndarray) else volume
    shape = volume.shape[1:]
    plan = BlockPlan.make(
        shape=shape,
        block_size=shape if block_size is None else block_size,
        halo=DEFAULT_HALO if halo is None else halo,
    )
    check_finite(volume)
    with Journal(":memory:") as journal:
        _predict_missing(plan, volume, predictor, journal, num_workers=1, progress=progress)
        stitched = stitch_blocks(plan, journal, progress=progress)
        labels = np.zeros(plan.shape, dtype=np.uint32)
        counter = ObjectCounter(stitched.num_objects)
        for block in plan:
            painted = stitched.paint(block.index)
            counter.add(painted, block.owned)
            labels[roi_slices(block.owned)] = painted
    table = counter.table(
        scores=stitched.scores, classes=stitched.classes, shape=plan.shape, spacing_um=volume.spacing_um
    )
    return labels, table


def _predict_missing(
    plan: BlockPlan, volume: Any, predictor: Any, journal: Journal, *, num_workers: int, progress: bool
) -> int:
    done = journal.blocks_in_state("done")
    missing = [block for block in plan if block.index not in done]
    if not missing:
        return 0
    if hasattr(predictor, "for_volume"):
        predictor = predictor.for_volume(volume)
    with tqdm(total=len(plan), initial=len(done), desc="predict", unit="block", disable=not progress) as bar:
        try:
            for index, rows in predict_blocks(
                missing, volume, predictor, num_workers=num_workers, on_start=journal.start_block
            ):
                journal.finish_block(index, rows)
                bar.update()
        except UnreadableBlockError as error:
            journal.mark_unreadable(error.block)
            raise
    return len(missing)


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


def _look_at_journal(path: Path, output: Path, table: Path, restart: bool) -> dict[str, Any] | None:
    """What the journal says, or None if a new run may begin."""
    if restart:
        if path.exists():
            try:
                Journal(path).close()
            except JournalInUseError:
                raise
            except ValueError:
                _log.warning("%s is not a usable journal and will be replaced", path)
        if output.exists() and not is_own_output(output):
            raise ValueError(f"{output} exists and was not written by seg3d predict; choose another OUTPUT")
        return None
    if path.exists():
        with Journal(path) as journal:
            if journal.fact("plan") is not None:
                stored = {name: journal.fact(name) for name in ("plan", "input", "state", "num_objects")}
                return stored | {"unreadable": bool(journal.blocks_in_state("unreadable"))}
    for found in (output, table):
        if found.exists():
            raise ValueError(f"{found} exists without the journal of its run; choose another OUTPUT or pass --restart")
    return None


def _check_same_plan(
    stored: dict[str, Any], facts: dict[str, Any], input_identity: dict[str, Any], output: Path
) -> bool:
    """Whether the input is the one that the journal knows; False if it was repaired after a failed reading."""
    begun = "finished" if stored["state"] == FINISHED else "begun"
    difference = describe_difference(stored["plan"], facts)
    if difference is None:
        difference = describe_difference(stored["input"], input_identity, "input.")
        if difference is None:
            return True
        if stored["unreadable"]:
            return False
    raise ValueError(f"{output} was {begun} with another plan ({difference}); pass --restart to start anew")


def _remove(journal: Path, output: Path, table: Path) -> None:
    journal.unlink(missing_ok=True)
    journal.with_name(journal.name + "-journal").unlink(missing_ok=True)
    for folder in (output, partial_path(output)):
        if folder.exists():
            shutil.rmtree(folder)
    table.unlink(missing_ok=True)


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
