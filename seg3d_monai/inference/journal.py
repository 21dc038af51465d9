"""The journal of a run: its plan, the state of every block and the instances that were found, in one SQLite file.

Written by the driver only, in rollback mode (a write-ahead log is unsafe on network file systems), one transaction per
block, so a run that is killed at any moment has whole blocks or nothing of them. Masks are kept as they were predicted:
thresholds and stitching act on reading. This file knows neither the predictor nor the output's format.
"""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from seg3d_monai.inference.blocks import Roi, roi_shape
from seg3d_monai.inference.instances import PlacedInstance, pack_mask, unpack_mask

FORMAT = 1
PREDICTING, PUBLISHING, FINISHED = "predicting", "publishing", "finished"

_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE blocks (block INTEGER PRIMARY KEY, state TEXT NOT NULL, started INTEGER NOT NULL);
CREATE TABLE instances (
    block INTEGER NOT NULL, number INTEGER NOT NULL, score REAL NOT NULL, class INTEGER NOT NULL, box BLOB NOT NULL,
    z1 INTEGER NOT NULL, y1 INTEGER NOT NULL, x1 INTEGER NOT NULL,
    z2 INTEGER NOT NULL, y2 INTEGER NOT NULL, x2 INTEGER NOT NULL, mask BLOB NOT NULL
);
CREATE UNIQUE INDEX instance_name ON instances (block, number);
"""
_COLUMNS = "number, score, class, box, z1, y1, x1, z2, y2, x2, mask"

PackedInstance = tuple[int, float, int, bytes, int, int, int, int, int, int, bytes]


def pack_instances(instances: Iterable[PlacedInstance]) -> list[PackedInstance]:
    """Instances as rows of the journal; small enough to travel from a worker to the driver."""
    return [
        (i.number, i.score, i.class_index, struct.pack("<6d", *i.box), *i.roi, pack_mask(i.mask)) for i in instances
    ]


class JournalInUseError(ValueError):
    """Another run holds the journal."""


class Journal:
    """An open journal.

    Args:
        path: the file, or ":memory:"; made if it does not exist.

    Raises:
        ValueError: if the file is in use by another run, is not a journal, or was written in another format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._db = sqlite3.connect(self.path, timeout=1.0, isolation_level=None)
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
        except sqlite3.Error as error:
            self._db.close()
            if "locked" in str(error):
                raise JournalInUseError(f"{self.path} is in use by another run; wait for it or end it") from error
            raise ValueError(f"{self.path} cannot be used as a journal: {error}; delete it to start anew") from error
        if found != FORMAT:
            self._db.close()
            raise ValueError(f"{self.path} has format {found}, this version writes {FORMAT}; pass --restart")

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
        self._db.execute("BEGIN IMMEDIATE")
        for name, value in facts.items():
            self.set_fact(name, value)
        self._db.execute("COMMIT")

    def start_block(self, block: int) -> None:
        """Note that a block is handed out; `starts` counts these."""
        self._db.execute(
            "INSERT INTO blocks VALUES (?, 'started', 1) "
            "ON CONFLICT (block) DO UPDATE SET state = 'started', started = started + 1",
            (block,),
        )

    def finish_block(self, block: int, rows: Sequence[PackedInstance]) -> None:
        """Store a block's instances and mark it done, in one transaction."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.execute("DELETE FROM instances WHERE block = ?", (block,))
            marks = ", ".join("?" * 12)
            self._db.executemany(f"INSERT INTO instances VALUES ({marks})", ((block, *row) for row in rows))
            self._db.execute("UPDATE blocks SET state = 'done' WHERE block = ?", (block,))
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def mark_unreadable(self, block: int) -> None:
        """Note that a block's voxels could not be read."""
        self._db.execute("UPDATE blocks SET state = 'unreadable' WHERE block = ?", (block,))

    def blocks_in_state(self, state: str) -> set[int]:
        """Blocks that are 'started', 'done' or 'unreadable'."""
        return {row[0] for row in self._db.execute("SELECT block FROM blocks WHERE state = ?", (state,))}

    def starts(self) -> dict[int, int]:
        """How many times each block was handed out."""
        return dict(self._db.execute("SELECT block, started FROM blocks"))

    def instances(self, block: int, roi: Roi | None = None, min_score: float | None = None) -> list[PlacedInstance]:
        """Instances of one block, by number.

        Args:
            block: index of the block.
            roi: only those whose extent overlaps this ROI, volume voxels.
            min_score: only those with at least this score.
        """
        query, values = f"SELECT {_COLUMNS} FROM instances WHERE block = ?", [block]
        if roi is not None:
            query += " AND z1 < ? AND y1 < ? AND x1 < ? AND z2 > ? AND y2 > ? AND x2 > ?"
            values += [roi[3], roi[4], roi[5], roi[0], roi[1], roi[2]]
        found = []
        for number, score, class_index, box, *extent, mask in self._db.execute(query + " ORDER BY number", values):
            if min_score is not None and score < min_score:
                continue
            z1, y1, x1, z2, y2, x2 = extent
            where = (z1, y1, x1, z2, y2, x2)
            found.append(
                PlacedInstance(
                    number=number,
                    score=score,
                    class_index=class_index,
                    box=struct.unpack("<6d", box),
                    roi=where,
                    mask=unpack_mask(mask, roi_shape(where)),
                )
            )
        return found


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
