"""Builds the SQLite crop index: each volume is scanned once, journalled, and written into a new file that is renamed.

Rollback journal, never WAL; one process writes. The index keeps what it was built from: `build_index` reuses a file
that matches exactly, takes over the volumes of one that matches in part, and scans the others, so a stale index is
never used silently. What a killed build leaves is taken up by the next. A finished file is never written to: readers
open it as immutable.

Must not know: torch, sampling, augmentation.
"""

import errno
import hashlib
import json
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np

from seg3d_monai.data.crop_index import BUILTIN_COLUMNS, CropIndex
from seg3d_monai.data.crop_index_format import (
    FORMAT_VERSION,
    INSTANCE,
    SCHEMA,
    OlderFormatError,
    connect_readonly,
    read_meta,
)
from seg3d_monai.data.crop_index_journal import ScanJournal
from seg3d_monai.data.crop_index_scan import ScanJob, open_files, scan_volumes
from seg3d_monai.data.data_config import DataConfig
from seg3d_monai.data.file_evidence import Evidence, evidence_of, is_constant, voxel_digest
from seg3d_monai.data.manifest import (
    FILE_COLUMNS,
    Location,
    Manifest,
    ManifestRow,
    file_digest,
    read_manifest,
    select_rows,
)
from seg3d_monai.data.volume import Volume

logger = logging.getLogger(__name__)

_TABLES = ("instances", "crop_columns", "crop_instances")


def build_index(
    manifest: Manifest | str | os.PathLike[str],
    db: str | os.PathLike[str],
    config: DataConfig,
    *,
    num_workers: int = 1,
    skip_bad: bool = False,
    needs_labels: bool = True,
    progress: bool = True,
) -> CropIndex:
    """Build the crop index of a manifest, or reuse the file if it was built from exactly the same things.

    Volumes that an earlier index of the same configuration holds, and whose files are unchanged, are not scanned again.
    A build that was interrupted goes on; its journal is `db` with the suffix .building.

    Args:
        manifest: a manifest, or the path of one. Volumes without labels are in the index too, as unlabelled.
        db: path of the index file.
        config: how volumes are cut and which are taken.
        num_workers: processes that scan, at most; with 1, or little to do, it is this one. Others import the script
            that calls, which needs the usual ``if __name__ == "__main__":``.
        skip_bad: whether label chunks that cannot be decoded are left out, as ignore, instead of ending the build.
        needs_labels: whether a manifest without any label is refused; a pre-training needs none.
        progress: whether to show a progress bar.

    Returns:
        The index, opened.

    Raises:
        ValueError: for labels that are not ids, image and label of different shapes, chunks that cannot be decoded,
            voxels that are not finite, label ids without a class, one image in two splits, a file or a manifest that
            was changed meanwhile, a file at `db` that is no index, and a manifest without labels.
        OSError: the disk is full or fails.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers={num_workers} is not a number of processes; use 1 or more")
    if not isinstance(manifest, Manifest):
        manifest = read_manifest(manifest)
    rows = select_rows(manifest.rows, config.where)
    if needs_labels and all(row.label is None for row in rows):
        raise ValueError("no row of the manifest has a label volume; fill the column 'label'")
    _check_attributes(rows)

    target = Path(db).absolute()
    files = [open_files(row) for row in rows]
    evidence = [
        {column: evidence_of(volume, getattr(row, column)) for column, volume in opened.items()}
        for row, opened in zip(rows, files, strict=True)
    ]
    _check_duplicates(rows, files, evidence)
    meta = {"config": config.to_json(), "rows": _digest([_row_json(row) for row in rows])}
    try:
        with _Known(target) as known:
            kept = [known.volume(row, found, config, skip_bad) for row, found in zip(rows, evidence, strict=True)]
            changes = known.changes(meta, rows, kept)
            journal_path = target.with_name(f"{target.name}.building")
            if known.is_index and not changes:
                _clear(journal_path)
                return CropIndex(target)
            if changes:
                logger.warning(
                    "rebuilding the crop index %s: changed since it was built: %s", target, "; ".join(changes)
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            with ScanJournal(journal_path) as journal:
                jobs: dict[int, ScanJob] = {}
                for position, row in enumerate(rows):
                    if kept[position] is None:
                        jobs[position] = _job(row, files[position], evidence[position], journal, config, skip_bad)
                unfinished = [job for job in jobs.values() if journal.facts(job.scan_id) is None]
                scan_volumes(unfinished, journal, config, num_workers=num_workers, skip_bad=skip_bad, progress=progress)
                sources = [
                    _Source(journal.packed, jobs[position].scan_id, _facts(journal, jobs[position]))
                    if found is None
                    else found
                    for position, found in enumerate(kept)
                ]
                _write_index(target, manifest, rows, files, sources, meta, known.close)
            _remove(journal_path)
    except sqlite3.OperationalError as error:
        if "disk I/O" in str(error):  # a quota that is used up, too
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target)) from error
        if any(text in str(error) for text in ("unable to open", "readonly")):
            text = f"{target} cannot be written to ({error}); check the permissions of the file and of its folder"
            raise ValueError(text) from error
        if "full" not in str(error):
            raise
        text = "the disk is full; make room and run it again, it goes on where it was"
        raise OSError(errno.ENOSPC, text, str(target)) from error
    return CropIndex(target)


def _clear(journal_path: Path) -> None:
    """Remove the journal that a process left which was killed at the very end, not one that is in use."""
    if journal_path.exists():
        with suppress(ValueError):
            ScanJournal(journal_path).close()
            _remove(journal_path)


def _remove(journal_path: Path) -> None:
    journal_path.unlink(missing_ok=True)
    Path(f"{journal_path}-journal").unlink(missing_ok=True)


class _Source:
    """Where the packed rows of a volume come from, and what is known of it."""

    def __init__(self, packed: Any, number: int, facts: dict[str, Any]) -> None:
        self._packed, self._number, self.facts = packed, number, facts

    def rows(self, table: str) -> Iterable[tuple[Any, ...]]:
        """Without the volume's id."""
        found: Iterable[tuple[Any, ...]] = self._packed(table, self._number)
        return found


class _Known:
    """The index that is there already, if any: which of its volumes may be taken over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._meta: dict[str, Any] = {}
        self._volumes: dict[str, sqlite3.Row] = {}
        self._connection: sqlite3.Connection | None = None
        self._older: str | None = None
        try:
            self._meta = read_meta(path) if path.exists() else {}
        except OlderFormatError as error:
            self._older = str(error)
        if self._meta:
            self._connection = connect_readonly(path)
            self._volumes = {row["name"]: row for row in self._connection.execute("SELECT * FROM volumes ORDER BY id")}

    def __enter__(self) -> "_Known":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        if self._connection is not None:
            self._connection.close()

    @property
    def is_index(self) -> bool:
        return bool(self._meta)

    def volume(
        self,
        row: ManifestRow,
        evidence: Mapping[str, Evidence],
        config: DataConfig,
        skip_bad: bool,
    ) -> _Source | None:
        """A volume's rows, None where they are not there or of other files."""
        found = self._volumes.get(row.name)
        if found is None or _scan_config(self._meta["config"]) != _scan_config(config) or found["axes"] != row.axes:
            return None
        unreadable = json.loads(found["unreadable"])
        if json.loads(found["files"]) != evidence or (unreadable and not skip_bad):
            return None
        facts = {
            "intensity": json.loads(found["intensity"]),
            "num_instances": found["num_instances"],
            "num_crops": found["num_crops"],
            "unreadable": unreadable,
            "files": evidence,
        }
        return _Source(self._packed, found["id"], facts)

    def changes(
        self, meta: Mapping[str, Any], rows: Sequence[ManifestRow], kept: Sequence[_Source | None]
    ) -> list[str]:
        """What is no longer as it was; empty also where there is no index."""
        if self._older is not None:
            return [self._older]
        if not self._meta:
            return []
        config = self._meta["config"].to_json()
        found = [key for key, value in meta["config"].items() if config[key] != value]
        names = [row.name for row in rows]
        for word, changed in (
            ("added", [name for name in names if name not in self._volumes]),
            ("removed", [name for name in self._volumes if name not in set(names)]),
        ):
            found += [f"volumes {word}: {_listed(changed)}"] if changed else []
        if _scan_config(self._meta["config"]) == _scan_config(DataConfig.from_json(meta["config"])):
            changed = [n for n, source in zip(names, kept, strict=True) if source is None and n in self._volumes]
            found += [f"files of {_listed(changed)}"] if changed else []
        if not found and meta["rows"] != self._meta["rows"]:
            found.append("manifest")
        return found

    def _packed(self, table: str, number: int) -> Iterable[tuple[Any, ...]]:
        assert self._connection is not None
        columns = "name, block, data" if table == "crop_columns" else "block, rows"
        order = "name, block" if table == "crop_columns" else "block"
        sql = f"SELECT {columns} FROM {table} WHERE volume_id = ? ORDER BY {order}"
        return (tuple(row) for row in self._connection.execute(sql, (number,)))


def _job(
    row: ManifestRow,
    files: dict[str, Volume],
    evidence: dict[str, Evidence],
    journal: ScanJournal,
    config: DataConfig,
    skip_bad: bool,
) -> ScanJob:
    """A volume's scan in the journal, as far as it has come."""
    paths = [None if getattr(row, column) is None else _stored(getattr(row, column)) for column in FILE_COLUMNS]
    scan_id = journal.scan_id(_digest([_scan_config(config), paths, row.axes, evidence]))
    facts = journal.facts(scan_id)
    unreadable = journal.unreadable(scan_id) if facts is None else facts["unreadable"]
    if unreadable and not skip_bad:
        journal.restart(scan_id)
    return ScanJob(row=row, scan_id=scan_id, files=files, evidence=evidence)


def _facts(journal: ScanJournal, job: ScanJob) -> dict[str, Any]:
    facts = journal.facts(job.scan_id)
    assert facts is not None
    return facts


def _write_index(
    target: Path,
    manifest: Manifest,
    rows: Sequence[ManifestRow],
    files: Sequence[Mapping[str, Volume]],
    sources: Sequence[_Source],
    meta: Mapping[str, Any],
    close_old: Callable[[], None],
) -> None:
    """Write the volumes in the order of the manifest: the same file, whichever way the rows came here."""
    new = target.with_name(f"{target.name}.new")
    new.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(new, isolation_level=None)) as connection:
            # Nothing reads the file before the rename, so its journal guards nothing and one sync at the end is enough.
            for pragma in ("page_size = 16384", "journal_mode = MEMORY", "synchronous = OFF", "cache_size = -65536"):
                connection.execute(f"PRAGMA {pragma}")
            connection.execute("BEGIN")
            for statement in filter(str.strip, SCHEMA.split(";")):
                connection.execute(statement)
            connection.executemany("INSERT INTO meta VALUES (?, ?)", [(k, json.dumps(v)) for k, v in meta.items()])
            first_crop = 1
            for volume_id, (row, opened, source) in enumerate(zip(rows, files, sources, strict=True), start=1):
                _write_volume(connection, volume_id, row, opened["image"], source, first_crop)
                first_crop += source.facts["num_crops"]
            connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
            connection.execute("COMMIT")
            connection.execute("ANALYZE")
        if manifest.digest is not None and _digest_now(manifest.file) != manifest.digest:
            raise ValueError(f"{manifest.file}: was edited while its volumes were indexed; run it again, it goes on")
        with new.open("r+b") as written:  # Windows flushes only what was opened for writing
            os.fsync(written.fileno())
        close_old()  # Windows replaces no file that is open
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)


def _write_volume(
    connection: sqlite3.Connection, volume_id: int, row: ManifestRow, image: Volume, source: _Source, first_crop: int
) -> None:
    instances: list[tuple[int, int, bytes]] = []
    num_classes = 1
    for block, packed in source.rows("instances"):
        table = np.frombuffer(packed, INSTANCE).copy()
        table["class"] = _classes_of(row, table["label"])
        num_classes = max(num_classes, int(table["class"].max()) + 1)
        instances.append((volume_id, block, table.tobytes()))
    facts = source.facts
    paths = [None if getattr(row, column) is None else _stored(getattr(row, column)) for column in FILE_COLUMNS]
    values = (
        *(volume_id, row.name, *paths, row.axes),
        *(int(n) for n in image.shape),
        *(row.spacing_um or image.spacing_um or (None, None, None)),
        *(row.specimen, row.split, json.dumps(facts["intensity"])),
        *(facts["num_instances"], num_classes, first_crop, facts["num_crops"]),
        *(json.dumps(facts["unreadable"]), json.dumps(facts["files"])),
    )
    connection.execute(f"INSERT INTO volumes VALUES ({', '.join('?' * len(values))})", values)
    connection.executemany(
        "INSERT INTO attributes VALUES (?, ?, ?)", [(volume_id, name, value) for name, value in row.attributes.items()]
    )
    connection.executemany("INSERT INTO instances VALUES (?, ?, ?)", instances)
    connection.executemany(
        "INSERT INTO crop_columns VALUES (?, ?, ?, ?)",
        ((name, volume_id, block, data) for name, block, data in source.rows("crop_columns")),
    )
    connection.executemany(
        "INSERT INTO crop_instances VALUES (?, ?, ?)",
        ((volume_id, block, packed) for block, packed in source.rows("crop_instances")),
    )


def _classes_of(row: ManifestRow, labels: np.ndarray) -> np.ndarray:
    if not isinstance(row.classes, Mapping):
        return np.full(len(labels), row.classes)
    classes = row.classes
    missing = [label for label in labels.tolist() if label not in classes]
    if missing:
        shown = f"{missing[:10]}{' …' if len(missing) > 10 else ''}"
        raise ValueError(f"{row.name}: label ids {shown} have no class; add them to the class table")
    return np.array([classes[label] for label in labels.tolist()])


def _check_attributes(rows: Iterable[ManifestRow]) -> None:
    names = {name for row in rows for name in row.attributes}
    taken = sorted(names & BUILTIN_COLUMNS)
    if taken:
        raise ValueError(f"manifest columns {', '.join(taken)} are names of the index itself; rename them")


def _check_duplicates(
    rows: Sequence[ManifestRow], files: Sequence[Mapping[str, Volume]], evidence: Sequence[Mapping[str, Evidence]]
) -> None:
    """One image under two names: refused across splits, else a warning."""
    first: dict[str | None, int] = {}
    for position, row in enumerate(rows):
        other = first.setdefault(evidence[position]["image"]["sample"], position)
        if other == position:
            continue
        a, b = files[other]["image"], files[position]["image"]
        if is_constant(a) or voxel_digest(a) != voxel_digest(b):
            continue
        text = f"{rows[other].name!r} and {row.name!r} are the same image, {rows[other].image} and {row.image}"
        if rows[other].split != row.split:
            raise ValueError(f"{text}, in the splits {rows[other].split} and {row.split}; remove one of them")
        logger.warning("%s; remove one of them unless that is meant", text)


def _scan_config(config: DataConfig) -> dict[str, Any]:
    """The keys that a scan depends on."""
    return {key: value for key, value in config.to_json().items() if key != "where"}


def _row_json(row: ManifestRow) -> list[Any]:
    classes = sorted(row.classes.items()) if isinstance(row.classes, Mapping) else row.classes
    paths = [None if getattr(row, column) is None else _stored(getattr(row, column)) for column in FILE_COLUMNS]
    attributes = sorted(row.attributes.items())
    return [row.name, *paths, row.axes, row.spacing_um, row.specimen, row.split, classes, attributes]


def _stored(path: Location) -> str:
    return path if isinstance(path, str) and "://" in path else os.path.abspath(path)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest_now(path: Path) -> str | None:
    return file_digest(path) if path.exists() else "gone"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
