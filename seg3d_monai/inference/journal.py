"""The journal of a run: its plan, the state of every block and all that was found, in one SQLite file.

Written by the driver only, in rollback mode (a write-ahead log is unsafe on network file systems), one transaction per
step, so a run that is killed at any moment has whole steps or nothing of them. Masks are kept as they were predicted:
thresholds and stitching act on reading. This file knows neither the predictor nor the output's format.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from seg3d_monai.inference.blocks import Roi, roi_shape
from seg3d_monai.inference.evidence import Census, Ints, Links, arrays_of
from seg3d_monai.inference.instances import PlacedInstance, pack_mask, unpack_mask
from seg3d_monai.inference.table import ObjectCounts

FORMAT = 3
PREDICTING, STITCHING, PAINTING, PUBLISHING, FINISHED = "predicting", "stitching", "painting", "publishing", "finished"
THRESHOLDS = ("score_threshold", "min_volume")
"""Entries of a plan that act when the journal is read: other ones need no new prediction."""
STARTED, DONE, EMPTY, UNREADABLE = "started", "done", "empty", "unreadable"

_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE blocks (block INTEGER PRIMARY KEY, state TEXT NOT NULL, started INTEGER NOT NULL, reason TEXT);
CREATE TABLE instances (
    block INTEGER NOT NULL, number INTEGER NOT NULL, score REAL NOT NULL, class INTEGER NOT NULL, box BLOB NOT NULL,
    z1 INTEGER NOT NULL, y1 INTEGER NOT NULL, x1 INTEGER NOT NULL,
    z2 INTEGER NOT NULL, y2 INTEGER NOT NULL, x2 INTEGER NOT NULL, mask BLOB NOT NULL
);
CREATE UNIQUE INDEX instance_name ON instances (block, number);
CREATE TABLE census (
    block INTEGER PRIMARY KEY, num_instances INTEGER NOT NULL, num_reach INTEGER NOT NULL,
    score BLOB NOT NULL, class_index BLOB NOT NULL, corner BLOB NOT NULL, own BLOB NOT NULL, home BLOB NOT NULL,
    reach BLOB NOT NULL
);
CREATE TABLE links (
    block INTEGER PRIMARY KEY, num_links INTEGER NOT NULL,
    other BLOB NOT NULL, theirs BLOB NOT NULL, mine BLOB NOT NULL, strength BLOB NOT NULL
);
CREATE TABLE painted (
    block INTEGER PRIMARY KEY, ids BLOB NOT NULL, voxels BLOB NOT NULL, sums BLOB NOT NULL, lower BLOB NOT NULL,
    upper BLOB NOT NULL
);
CREATE TABLE tiles (array TEXT NOT NULL, tile INTEGER NOT NULL, PRIMARY KEY (array, tile));
"""
_COLUMNS = "number, score, class, box, z1, y1, x1, z2, y2, x2, mask"
_CENSUS = {
    "score": ("<f8", ()),
    "class_index": ("<i4", ()),
    "corner": ("<i4", (3,)),
    "own": ("<i4", ()),
    "home": ("<i8", ()),
    "reach": ("<i8", (2,)),
}
_LINKS = {"other": ("<i8", ()), "theirs": ("<i4", ()), "mine": ("<i4", ()), "strength": ("<f8", ())}
_PAINTED = {
    "ids": ("<i8", ()),
    "voxels": ("<i8", ()),
    "sums": ("<i8", (3,)),
    "lower": ("<i4", (3,)),
    "upper": ("<i4", (3,)),
}
_Layout = Mapping[str, tuple[str, tuple[int, ...]]]

PackedInstance = tuple[int, float, int, bytes, int, int, int, int, int, int, bytes]


def pack_instances(instances: Iterable[PlacedInstance]) -> list[PackedInstance]:
    """Instances as rows of the journal; small enough to travel between a worker and the driver."""
    return [
        (i.number, i.score, i.class_index, struct.pack("<6d", *i.box), *i.roi, pack_mask(i.mask)) for i in instances
    ]


def unpack_instances(rows: Iterable[PackedInstance]) -> list[PlacedInstance]:
    """The instances that `pack_instances` packed."""
    found = []
    for number, score, class_index, box, z1, y1, x1, z2, y2, x2, mask in rows:
        roi = (z1, y1, x1, z2, y2, x2)
        found.append(
            PlacedInstance(
                number=number,
                score=score,
                class_index=class_index,
                box=struct.unpack("<6d", box),
                roi=roi,
                mask=unpack_mask(mask, roi_shape(roi)),
            )
        )
    return found


class RowSource:
    """Instances of a few blocks, from rows that were read from the journal or have yet to be written to it.

    Args:
        rows: rows by block.
    """

    def __init__(self, rows: Mapping[int, Sequence[PackedInstance]]) -> None:
        self.rows = rows

    def instances(self, block: int, roi: Roi | None = None, min_score: float | None = None) -> list[PlacedInstance]:
        """As `Journal.instances`."""
        return unpack_instances(row for row in self.rows[block] if _is_wanted(row, roi, min_score))


def _is_wanted(row: PackedInstance, roi: Roi | None, min_score: float | None) -> bool:
    if min_score is not None and row[1] < min_score:
        return False
    _, _, _, _, z1, y1, x1, z2, y2, x2, _ = row
    return roi is None or (z1 < roi[3] and y1 < roi[4] and x1 < roi[5] and z2 > roi[0] and y2 > roi[1] and x2 > roi[2])


class _Connection(sqlite3.Connection):
    """A connection that says "disk full" as the operating system does."""

    def execute(self, *args: Any) -> sqlite3.Cursor:
        with _disk_full():
            return super().execute(*args)

    def executemany(self, *args: Any) -> sqlite3.Cursor:
        with _disk_full():
            return super().executemany(*args)


@contextmanager
def _disk_full() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if "full" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        if "disk I/O" in str(error):  # a quota that is used up, too
            raise OSError(errno.EIO, f"{os.strerror(errno.EIO)} in the journal") from error
        raise


def _not_writable(path: str, error: Exception) -> str:
    return f"{path} cannot be written to ({error}); check the permissions of the file and of its folder"


class JournalInUseError(ValueError):
    """Another run holds the journal."""


class Journal:
    """An open journal.

    Args:
        path: the file, or ":memory:"; made if it does not exist.

    Raises:
        ValueError: if the file is in use by another run, may not be written to, is not a journal, or was written in
            another format.
        OSError: if the disk is full or fails, here and in all that writes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        try:
            self._db = sqlite3.connect(self.path, timeout=1.0, isolation_level=None, factory=_Connection)
        except sqlite3.OperationalError as error:
            raise ValueError(_not_writable(self.path, error)) from error
        try:
            # The exclusive lock keeps a second driver out; it goes with the process, however that ends.
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = DELETE")
            self._db.execute("BEGIN IMMEDIATE")
            if not self._db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute("INSERT INTO facts VALUES ('format', ?)", (json.dumps(FORMAT),))
            self._db.execute("COMMIT")
            found = self.fact("format")
        except OSError:
            self._db.close()
            raise
        except sqlite3.Error as error:
            self._db.close()
            if "locked" in str(error):
                raise JournalInUseError(f"{self.path} is in use by another run; wait for it or end it") from error
            if isinstance(error, sqlite3.OperationalError):
                raise ValueError(_not_writable(self.path, error)) from error
            raise ValueError(f"{self.path} cannot be used as a journal: {error}; delete it to start anew") from error
        if found != FORMAT:
            self._db.close()
            raise ValueError(
                f"{self.path} has format {found}, this version writes {FORMAT}; finish it with the version that began "
                "it, or predict anew with --restart"
            )

    def close(self) -> None:
        """Give the file and its lock back."""
        self._db.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fact(self, name: str) -> Any:
        """A stored JSON value, or None."""
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    def set_fact(self, name: str, value: Any) -> None:
        """Store a JSON value under a name."""
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value, sort_keys=True)))

    def begin(self, facts: dict[str, Any]) -> None:
        """Store the facts of a new run, all or none."""
        with self.transaction():
            for name, value in facts.items():
                self.set_fact(name, value)

    def start_block(self, block: int) -> None:
        """Note that a block is handed out; `starts` counts these."""
        self._db.execute(
            "INSERT INTO blocks VALUES (?, ?, 1, NULL) "
            "ON CONFLICT (block) DO UPDATE SET state = excluded.state, started = started + 1, reason = NULL",
            (block, STARTED),
        )

    def finish_blocks(self, found: Mapping[int, tuple[Sequence[PackedInstance], Census]]) -> None:
        """Store the instances of blocks and their census and mark them done, all or none."""
        marks = ", ".join("?" * 12)
        with self.transaction():
            for block, (rows, census) in found.items():
                self._db.execute("DELETE FROM instances WHERE block = ?", (block,))
                self._db.executemany(f"INSERT INTO instances VALUES ({marks})", ((block, *row) for row in rows))
                self.store_census(block, census)
                self._set_state(block, DONE)

    def mark_empty(self, blocks: Iterable[int]) -> None:
        """Note blocks that need no prediction."""
        with self.transaction():
            self._db.executemany("INSERT OR IGNORE INTO blocks VALUES (?, ?, 0, NULL)", ((b, EMPTY) for b in blocks))

    def mark_unreadable(self, block: int, reason: str) -> None:
        """Note that a block's voxels could not be read, and why."""
        self._set_state(block, UNREADABLE, reason)

    def _set_state(self, block: int, state: str, reason: str | None = None) -> None:
        self._db.execute(
            "INSERT INTO blocks VALUES (?, ?, 0, ?) "
            "ON CONFLICT (block) DO UPDATE SET state = excluded.state, reason = excluded.reason",
            (block, state, reason),
        )

    def forget_links(self, blocks: Iterable[int]) -> None:
        """Forget the links of some blocks."""
        with self.transaction():
            self._db.executemany("DELETE FROM links WHERE block = ?", ((block,) for block in blocks))

    def forget(self, facts: dict[str, Any], *tables: str) -> None:
        """Store facts and empty some of the tables `census`, `links`, `painted`, `tiles`, all or nothing."""
        with self.transaction():
            for name, value in facts.items():
                self.set_fact(name, value)
            for table in tables:
                self._db.execute(f"DELETE FROM {table}")

    def change_thresholds(self, plan: dict[str, Any]) -> None:
        """Store a plan that differs from the stored one in `THRESHOLDS` only, and forget what followed from these."""
        lost = ["census", "links"] if plan["score_threshold"] != self.fact("plan")["score_threshold"] else []
        state = PREDICTING if self.fact("state") == PREDICTING else STITCHING
        self.forget({"plan": plan, "state": state}, *lost, "painted", "tiles")

    def blocks_in_state(self, *states: str) -> set[int]:
        """Blocks that are in one of some states."""
        marks = ", ".join("?" * len(states))
        return {row[0] for row in self._db.execute(f"SELECT block FROM blocks WHERE state IN ({marks})", states)}

    def finished(self) -> set[int]:
        """Blocks that are done or empty."""
        return self.blocks_in_state(DONE, EMPTY)

    def unreadable(self) -> dict[int, str]:
        """Blocks that could not be read, and why."""
        query = "SELECT block, reason FROM blocks WHERE state = ? ORDER BY block"
        return dict(self._db.execute(query, (UNREADABLE,)))

    def starts(self) -> dict[int, int]:
        """How many times each block was handed out."""
        return dict(self._db.execute("SELECT block, started FROM blocks WHERE started > 0"))

    def num_instances(self) -> int:
        """Instances of all blocks."""
        return int(self._db.execute("SELECT COUNT(*) FROM instances").fetchone()[0])

    def rows(self, block: int, roi: Roi | None = None, min_score: float | None = None) -> list[PackedInstance]:
        """Rows of one block's instances, by number.

        Args:
            block: index of the block.
            roi: only those whose extent overlaps this ROI, volume voxels.
            min_score: only those with at least this score.
        """
        query, values = f"SELECT {_COLUMNS} FROM instances WHERE block = ?", [block]
        if roi is not None:
            query += " AND z1 < ? AND y1 < ? AND x1 < ? AND z2 > ? AND y2 > ? AND x2 > ?"
            values += [roi[3], roi[4], roi[5], roi[0], roi[1], roi[2]]
        found = self._db.execute(query + " ORDER BY number", values)
        return [row for row in found if min_score is None or row[1] >= min_score]

    def instances(self, block: int, roi: Roi | None = None, min_score: float | None = None) -> list[PlacedInstance]:
        """The same as instances."""
        return unpack_instances(self.rows(block, roi, min_score))

    def store_census(self, block: int, census: Census) -> None:
        """Store a block's census."""
        self._store("census", block, (len(census), len(census.reach)), arrays_of(census), _CENSUS)

    def store_links(self, block: int, links: Links) -> None:
        """Store a block's links."""
        self._store("links", block, (len(links),), arrays_of(links), _LINKS)

    def store_painted(self, block: int, counts: ObjectCounts) -> None:
        """Note that a block is painted, and what it holds."""
        self._store("painted", block, (), arrays_of(counts), _PAINTED)

    def store_tiles(self, array: str, tiles: Iterable[int]) -> None:
        """Note that tiles of an array of the output are written."""
        with self.transaction():
            self._db.executemany("INSERT OR REPLACE INTO tiles VALUES (?, ?)", ((array, tile) for tile in tiles))

    def blocks_with(self, table: str) -> set[int]:
        """Blocks that have a row in `census`, `links` or `painted`."""
        return {row[0] for row in self._db.execute(f"SELECT block FROM {table}")}

    def tiles(self, array: str) -> set[int]:
        """Tiles of an array of the output that are written."""
        return {row[0] for row in self._db.execute("SELECT tile FROM tiles WHERE array = ?", (array,))}

    def home(self, block: int) -> Ints:
        """`Census.home` of a block; empty where it has no census."""
        row = self._db.execute("SELECT home FROM census WHERE block = ?", (block,)).fetchone()
        return np.frombuffer(b"" if row is None else row[0], "<i8")

    def evidence_counts(self) -> Iterator[tuple[int, int, int, int]]:
        """(block, instances, reach rows, links) of every block that was counted, ascending."""
        yield from self._db.execute(
            "SELECT block, num_instances, num_reach, IFNULL(num_links, 0) FROM census LEFT JOIN links USING (block) "
            "ORDER BY block"
        )

    def evidence(self) -> Iterator[tuple[int, Census, Links]]:
        """(block, census, links) of every block that was counted, ascending."""
        names = [f"census.{name}" for name in _CENSUS] + [f"links.{name}" for name in _LINKS]
        query = f"SELECT census.block, {', '.join(names)} FROM census LEFT JOIN links USING (block) ORDER BY 1"
        for block, *blobs in self._db.execute(query):
            census = _arrays(blobs[: len(_CENSUS)], _CENSUS)
            links = _arrays([blob or b"" for blob in blobs[len(_CENSUS) :]], _LINKS)
            yield block, Census(**census), Links(**links)

    def painted(self) -> Iterator[tuple[int, ObjectCounts]]:
        """(block, what it holds) of every painted block, ascending."""
        query = f"SELECT block, {', '.join(_PAINTED)} FROM painted ORDER BY block"
        for block, *blobs in self._db.execute(query):
            yield block, ObjectCounts(**_arrays(blobs, _PAINTED))

    def _store(
        self, table: str, block: int, counts: tuple[int, ...], arrays: Mapping[str, np.ndarray], layout: _Layout
    ) -> None:
        blobs = [np.ascontiguousarray(arrays[name], dtype).tobytes() for name, (dtype, _) in layout.items()]
        marks = ", ".join("?" * (1 + len(counts) + len(blobs)))
        self._db.execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", (block, *counts, *blobs))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written within it is kept, or nothing; one within another is part of it."""
        if self._db.in_transaction:
            yield
            return
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise


def _arrays(blobs: Sequence[bytes], layout: _Layout) -> dict[str, Any]:
    return {
        name: np.frombuffer(blob, dtype).reshape(-1, *shape)
        for blob, (name, (dtype, shape)) in zip(blobs, layout.items(), strict=True)
    }


def describe_difference(old: Any, new: Any, name: str = "") -> str | None:
    """The first difference between two JSON values, as `name: old -> new`, or None if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if key not in old or key not in new:
                return f"{name}{key}: {old.get(key, 'absent')!r} -> {new.get(key, 'absent')!r}"
            found = describe_difference(old[key], new[key], f"{name}{key}.")
            if found is not None:
                return found
        return None
    return None if old == new else f"{name.rstrip('.')}: {old!r} -> {new!r}"
