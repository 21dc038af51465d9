"""Take corrected regions back: new label volumes, a new manifest, its index, and the command that goes on training.

Files of the user are only read. New labels are complete before the manifest that names them takes its place in one
step, so a kill at any moment leaves the manifest as it was, and the same import again ends the same.

Must not import models.
"""

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from seg3d_monai.annotation.corrected import Corrected, read_corrected
from seg3d_monai.annotation.merge import Merged, merge_regions
from seg3d_monai.annotation.task import AnnotationTask, Region, read_task
from seg3d_monai.data import DataConfig, Manifest, ManifestRow, build_index, read_manifest, write_manifest

RECORD = "imported.json"
"""Beside task.json: digests of the manifests that imports of the folder wrote, which they alone may replace."""


@dataclass(frozen=True)
class Imported:
    """What was taken back.

    Attributes:
        manifest: the new manifest.
        index: its crop index.
        taken: the regions that were taken for truth.
        untouched: regions that nobody changed.
        num_volumes: volumes with new labels.
        num_objects: new objects.
        num_kept: corrected voxels that were annotated before and stayed as they were.
        command: goes on training with old and new labels.
    """

    manifest: Path
    index: Path
    taken: tuple[Region, ...]
    untouched: tuple[Region, ...]
    num_volumes: int
    num_objects: int
    num_kept: int
    command: str

    def __str__(self) -> str:
        lines = [f"{len(self.taken)} regions: {self.num_objects} new objects in {self.num_volumes} volumes"]
        if self.untouched:
            names = ", ".join(region.folder for region in self.untouched)
            lines.append(f"not taken, as nobody changed them: {names} (accept_unchanged takes them as they are)")
        if self.num_kept:
            lines.append(f"{self.num_kept} voxels were annotated before and stay so (replace_known takes the new ones)")
        lines += [f"manifest: {self.manifest}", f"index: {self.index}"]
        lines.append(f"go on training, with what else the first training was given: {self.command}")
        return "\n".join(lines)


def import_annotations(
    folder: str | Path,
    manifest: str | Path,
    *,
    output: str | Path | None = None,
    only: Collection[int] | None = None,
    accept_unchanged: bool = False,
    allow_empty: bool = False,
    replace_known: bool = False,
    min_inside: float = 0.5,
    specimen_pattern: str | None = None,
    num_workers: int = 1,
    skip_bad: bool = False,
    progress: bool = True,
) -> Imported:
    """Take back the corrected labels of a folder that `suggest_regions` wrote.

    Args:
        folder: with task.json.
        manifest: of the volumes that regions were suggested of; what was imported before, if anything was.
        output: manifest to write, .csv, .parquet or .json; default manifest.csv in the folder, or manifest.json where a
            CSV cannot hold it. Labels go to labels/ beside it.
        only: numbers of the regions to take; None for all that were changed.
        accept_unchanged: whether labels that nobody changed are taken for truth as they are.
        allow_empty: whether a region may hold no object.
        replace_known: whether corrections win over what was annotated before.
        min_inside: share of its voxels that an object must have inside its region to count, see `merge_regions`.
        specimen_pattern: as for `read_manifest`.
        num_workers: processes that index.
        skip_bad: as for `build_index`.
        progress: show a progress bar.

    Returns:
        What was taken, and where it is.

    Raises:
        FileNotFoundError: the folder holds no task, or there is no manifest.
        ValueError: labels are at fault (all faults are listed), nothing was changed, or `output` is another file of the
            user's.
        OSError: the disk is full.
    """
    folder = Path(folder)
    if not 0.0 <= min_inside <= 1.0:
        raise ValueError(f"min_inside={min_inside} is not a share; use a number from 0 to 1")
    task = read_task(folder)
    old = read_manifest(manifest, specimen_pattern=specimen_pattern)
    target = Path(folder / _default_name(old, task) if output is None else output).absolute()
    written = _check_target(target, old, folder)
    wanted = {region.volume for region in task.regions}
    shapes = {row.name: row.open_image().shape[1:] for row in old.rows if row.name in wanted}
    taken, untouched = read_corrected(
        folder, task, shapes, only=only, accept_unchanged=accept_unchanged, allow_empty=allow_empty
    )
    if not taken:
        raise ValueError(
            f"{folder}: none of {len(untouched)} regions was changed; correct labels.tif and save over it, or take "
            "what is there for truth with accept_unchanged (--accept_unchanged)"
        )
    by_volume: dict[str, list[Corrected]] = {}
    for one in taken:
        by_volume.setdefault(one.region.volume, []).append(one)
    merged: dict[str, Merged] = {}
    for row in old.rows:
        if row.name in by_volume:
            merged[row.name] = merge_regions(
                row,
                by_volume[row.name],
                target.parent / "labels",
                replace_known=replace_known,
                min_inside=min_inside,
            )
    rows, pins_splits = _rows(old.rows, {name: one.row for name, one in merged.items()}, task)
    _publish(target, rows, folder, written)
    index = _index(target, task, num_workers, skip_bad, progress)
    return Imported(
        manifest=target,
        index=index,
        taken=tuple(one.region for one in taken),
        untouched=tuple(untouched),
        num_volumes=len(merged),
        num_objects=sum(one.num_objects for one in merged.values()),
        num_kept=sum(one.num_kept for one in merged.values()),
        command=_command(target, folder, task.training, pins_splits),
    )


def _default_name(old: Manifest, task: AnnotationTask) -> str:
    """A CSV, but where there are tables of classes, or where cells have types of their own."""
    has_tables = task.num_classes > 1 or not all(isinstance(row.classes, int) for row in old.rows)
    return "manifest.json" if has_tables or old.file.suffix.lower() in (".json", ".parquet") else "manifest.csv"


def _check_target(target: Path, old: Manifest, folder: Path) -> list[str]:
    """See that `target` is free, or of an earlier import of this folder; digests of what such imports wrote."""
    record = folder / RECORD
    written: list[str] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else []
    if not target.parent.is_dir():
        raise FileNotFoundError(f"output {target}: its folder does not exist; make it first")
    if target.exists():
        if old.file.exists() and target.samefile(old.file):
            raise ValueError(f"output {target} is the manifest itself, which is never overwritten; name a new one")
        if target.is_dir() or _digest(target) not in written:
            raise ValueError(f"output {target} exists and was not written by an import of {folder}; name a new one")
    return written


def _rows(
    rows: Sequence[ManifestRow], merged: Mapping[str, ManifestRow], task: AnnotationTask
) -> tuple[list[ManifestRow], bool]:
    """All volumes with the splits that regions were suggested under, and whether the manifest had none of its own.

    Without these a training would divide specimens anew, now that more are labelled, and judge itself on volumes that
    the weights it starts from were trained on.
    """
    rows = [merged.get(row.name, row) for row in rows]
    has_own = any(row.split is not None for row in rows)
    is_split = has_own or any(task.splits.values())
    found = []
    for row in rows:
        split = row.split if has_own else task.splits.get(row.name)
        if is_split and split is None and row.label is not None:
            split = task.split
        found.append(replace(row, split=split, specimen=task.specimens.get(row.name, row.specimen)))
    return found, is_split and not has_own


def _publish(target: Path, rows: Sequence[ManifestRow], folder: Path, written: Sequence[str]) -> None:
    """Write the manifest, and see that it can be read, before it takes its place."""
    partial = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        write_manifest(partial, rows)
        read_manifest(partial)
        digest = _digest(partial)
        if digest not in written:
            _write(folder / RECORD, json.dumps([*written, digest]) + "\n")
        if not target.exists() or _digest(target) != digest:
            partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _index(target: Path, task: AnnotationTask, num_workers: int, skip_bad: bool, progress: bool) -> Path:
    """Index the new manifest, taking over the volumes of the old index whose files are the same."""
    db = target.with_suffix(".sqlite")
    if not db.exists() and Path(task.index).is_file():
        partial = db.with_name(f"{db.name}.copy")
        shutil.copyfile(task.index, partial)
        partial.replace(db)
    config = DataConfig.from_json(task.config)
    build_index(target, db, config, num_workers=num_workers, skip_bad=skip_bad, progress=progress)
    return db


def _command(target: Path, folder: Path, training: Mapping[str, Any], pins_splits: bool) -> str:
    words = ["seg3d", "train", str(training.get("bundle", "BUNDLE"))]
    if training.get("overlay"):
        words += ["--overlay", str(training["overlay"])]
    words += ["--dataset_dir", str(target), "--initial_weights", str(training.get("checkpoint", "MODEL.pt"))]
    for name in ("in_channels", "num_classes"):
        if training.get(name, 1) != 1:
            words += [f"--{name}", str(training[name])]
    if pins_splits:  # an overlay may ask for specimens, and the new manifest has the splits
        words += ["--index#val_specimens", "[]", "--index#test_specimens", "[]"]
    return shlex.join([*words, "--output_dir", str(folder / "run")])


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
