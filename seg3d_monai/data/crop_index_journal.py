"""The journal of an unfinished index: blocks that were measured and volumes that are complete, safe from any kill.

One SQLite file beside the index, `X.building`, with a rollback journal and one writer, which holds it locked; it is
deleted once the index is in its place. Volumes are known by a key of everything that their scan depends on, so that
what is there is right whatever manifest and configuration the next run has.

Must not know: voxels, manifests, the meaning of rows.
"""

import json
import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from seg3d_monai.data.crop_index_format import FORMAT_VERSION, PACKED_TABLES

_SCHEMA = (
    """
CREATE TABLE scans (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, facts TEXT);
CREATE TABLE parts (
    scan_id INTEGER NOT NULL, number INTEGER NOT NULL, unreadable TEXT NOT NULL, rows BLOB NOT NULL,
    PRIMARY KEY (scan_id, number)
);
"""
    + PACKED_TABLES
)
_COMMIT_SECONDS = 2.0


class ScanJournal:
    """Opens or makes a journal, and locks it.

    Args:
        path: of the file.

    Raises:
        ValueError: another process has it open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection = sqlite3.connect(path, isolation_level=None, timeout=0.2)
        try:
            self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._connection.execute("PRAGMA page_size = 16384")
            self._connection.execute("PRAGMA cache_size = -65536")
            self._connection.execute("BEGIN IMMEDIATE")
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
            if version != FORMAT_VERSION:
                for (table,) in self._connection.execute(
                    "SELECT name FROM sqlite_master WHERE type = 'table'"
                ).fetchall():
                    self._connection.execute(f'DROP TABLE "{table}"')
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
        except BaseException as error:
            self._connection.close()
            if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
                raise ValueError(f"{path}: another process is building this index; wait for it, or end it") from None
            raise
        self._last_commit = time.monotonic()

    def __enter__(self) -> "ScanJournal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, sqlite3.Error) and self._connection.in_transaction:
            self._connection.execute("ROLLBACK")
        self.close()

    def close(self) -> None:
        """Make what was added safe, and give the file free."""
        try:
            if self._connection.in_transaction:
                self._connection.execute("COMMIT")
        finally:
            self._connection.close()

    def scan_id(self, key: str) -> int:
        """The number of a volume's scan, which is begun if it is not there."""
        self._connection.execute("INSERT OR IGNORE INTO scans (key) VALUES (?)", (key,))
        return int(self._connection.execute("SELECT id FROM scans WHERE key = ?", (key,)).fetchone()[0])

    def facts(self, scan_id: int) -> dict[str, Any] | None:
        """What `finish` was told of a scan; None while it is unfinished."""
        found = self._connection.execute("SELECT facts FROM scans WHERE id = ?", (scan_id,)).fetchone()[0]
        return None if found is None else dict(json.loads(found))

    def parts(self, scan_id: int) -> set[int]:
        """The blocks of a scan that are measured."""
        return {row[0] for row in self._connection.execute("SELECT number FROM parts WHERE scan_id = ?", (scan_id,))}

    def add_part(self, scan_id: int, number: int, rows: np.ndarray, unreadable: list[list[int]]) -> None:
        """Keep the rows of one block, int64 [n, 8], and the regions of it that could not be read."""
        values = (scan_id, number, json.dumps(unreadable), rows.astype("<i8").tobytes())
        self._connection.execute("INSERT INTO parts VALUES (?, ?, ?, ?)", values)
        if time.monotonic() - self._last_commit > _COMMIT_SECONDS:
            self.commit()

    def read_part(self, scan_id: int, number: int) -> np.ndarray:
        """The rows of one block."""
        found = self._connection.execute(
            "SELECT rows FROM parts WHERE scan_id = ? AND number = ?", (scan_id, number)
        ).fetchone()
        return np.frombuffer(found[0], "<i8").reshape(-1, 8)

    def unreadable(self, scan_id: int) -> list[list[int]]:
        """All regions of a volume that could not be read, in the order of the blocks."""
        found = self._connection.execute("SELECT unreadable FROM parts WHERE scan_id = ? ORDER BY number", (scan_id,))
        return [roi for row in found for roi in json.loads(row[0])]

    def add_packed(self, table: str, rows: Iterable[tuple[Any, ...]]) -> None:
        """Insert rows into one of the packed tables; their volume_id is the scan's number."""
        marks = "?, ?, ?, ?" if table == "crop_columns" else "?, ?, ?"
        self._connection.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)

    def finish(self, scan_id: int, facts: dict[str, Any]) -> None:
        """Say that a volume's packed rows are complete, and drop its blocks."""
        self._connection.execute("DELETE FROM parts WHERE scan_id = ?", (scan_id,))
        self._connection.execute("UPDATE scans SET facts = ? WHERE id = ?", (json.dumps(facts), scan_id))
        if time.monotonic() - self._last_commit > _COMMIT_SECONDS:
            self.commit()

    def clear_packed(self, scan_id: int) -> None:
        """Drop the packed rows of a scan."""
        for table in ("instances", "crop_columns", "crop_instances"):
            self._connection.execute(f"DELETE FROM {table} WHERE volume_id = ?", (scan_id,))

    def restart(self, scan_id: int) -> None:
        """Drop everything of a scan."""
        self.clear_packed(scan_id)
        self._connection.execute("DELETE FROM parts WHERE scan_id = ?", (scan_id,))
        self._connection.execute("UPDATE scans SET facts = NULL WHERE id = ?", (scan_id,))

    def packed(self, table: str, scan_id: int) -> Iterable[tuple[Any, ...]]:
        """Rows of a packed table without their volume_id, in the order of their key."""
        columns = "name, block, data" if table == "crop_columns" else "block, rows"
        order = "name, block" if table == "crop_columns" else "block"
        return self._connection.execute(
            f"SELECT {columns} FROM {table} WHERE volume_id = ? ORDER BY {order}", (scan_id,)
        )

    def commit(self) -> None:
        """Make what was added safe."""
        self._connection.execute("COMMIT")
        self._connection.execute("BEGIN IMMEDIATE")
        self._last_commit = time.monotonic()
