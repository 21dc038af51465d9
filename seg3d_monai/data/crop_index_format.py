"""The file format of the crop index: one SQLite file, its tables, and the packed rows inside them.

Volumes and their attributes are rows. What there is one of for every crop or instance is packed: `crop_columns` holds a
column of `CROPS_PER_BLOCK` crops in a row, `instances` as many `INSTANCE` records as `INSTANCES_PER_BLOCK`, and
`crop_instances` the `VISIBLE` records of `CROPS_PER_LIST` crops behind their counts. A filter over ten million crops so
reads tens of megabytes, and one crop a few kilobytes. Where a crop lies follows from its number, see `crop_grid`.

Must not know: sampling, how an index is built.
"""

import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np

from seg3d_monai.data.data_config import DataConfig

FORMAT_VERSION = 2
REBUILD = "build it again with `seg3d index MANIFEST DB`"

CROPS_PER_BLOCK, CROPS_PER_LIST, INSTANCES_PER_BLOCK = 4096, 64, 256
COUNT = np.dtype("<u4")
CROP_COLUMNS = ("num_instances", "foreground_voxels", "ignored_voxels")
INSTANCE = np.dtype([("label", "<i8"), ("voxels", "<i8"), ("class", "<i4"), ("box", "<i4", 6)])
VISIBLE = np.dtype([("id", "<u4"), ("voxels", "<u4"), ("box", "<u2", 6)])

PACKED_TABLES = """
CREATE TABLE instances (
    volume_id INTEGER NOT NULL, block INTEGER NOT NULL, rows BLOB NOT NULL, PRIMARY KEY (volume_id, block)
);
CREATE TABLE crop_columns (
    name TEXT NOT NULL, volume_id INTEGER NOT NULL, block INTEGER NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (name, volume_id, block)
);
CREATE TABLE crop_instances (
    volume_id INTEGER NOT NULL, block INTEGER NOT NULL, rows BLOB NOT NULL, PRIMARY KEY (volume_id, block)
);
"""
SCHEMA = (
    """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE volumes (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE,
    image TEXT NOT NULL, label TEXT, ignore TEXT, axes TEXT,
    channels INTEGER NOT NULL, size_z INTEGER NOT NULL, size_y INTEGER NOT NULL, size_x INTEGER NOT NULL,
    spacing_z_um REAL, spacing_y_um REAL, spacing_x_um REAL,
    specimen TEXT NOT NULL, split TEXT, intensity TEXT NOT NULL,
    num_instances INTEGER NOT NULL, num_classes INTEGER NOT NULL,
    first_crop INTEGER NOT NULL, num_crops INTEGER NOT NULL,
    unreadable TEXT NOT NULL, files TEXT NOT NULL
);
CREATE INDEX volume_crops ON volumes (first_crop);
CREATE TABLE attributes (
    volume_id INTEGER NOT NULL, name TEXT NOT NULL, value NOT NULL, PRIMARY KEY (volume_id, name)
) WITHOUT ROWID;
"""
    + PACKED_TABLES
)


def connect_readonly(path: Path) -> sqlite3.Connection:
    """A connection that takes no lock and writes nothing, safe on network file systems: a finished index never changes.

    Objects of sqlite3 may be collected by another thread than their own; queries never cross threads.
    """
    connection = sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    return connection


def read_meta(path: Path) -> dict[str, Any]:
    """What the index at `path` was built from: the `DataConfig` under "config", and digests.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no index, or one of another format.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the SQLite file of a crop index")
    if not path.is_file():
        raise FileNotFoundError(f"there is no crop index at {path}; build it with `seg3d index MANIFEST DB`")
    connection = connect_readonly(path)
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        meta = dict(connection.execute("SELECT key, value FROM meta").fetchall())
    except sqlite3.DatabaseError:
        raise ValueError(f"{path} is not a crop index; {REBUILD}, or give the path of one") from None
    finally:
        connection.close()
    if "config" not in meta:
        raise ValueError(f"{path} is not a crop index; {REBUILD}, or give the path of one")
    if version != FORMAT_VERSION:
        raise OlderFormatError(f"{path} has index format {version}, this version reads {FORMAT_VERSION}; {REBUILD}")
    found: dict[str, Any] = {key: json.loads(value) for key, value in meta.items()}
    found["config"] = DataConfig.from_json(found["config"])
    return found


class OlderFormatError(ValueError):
    """An index that another version of this package wrote."""


def pack_visible(counts: np.ndarray, rows: np.ndarray) -> bytes:
    """Records of the crops of one list, behind how many each crop has."""
    return counts.astype(COUNT).tobytes() + rows.tobytes()


def unpack_visible(packed: bytes, num_crops: int, position: int) -> np.ndarray:
    """`VISIBLE` records of one crop of a list."""
    counts = np.frombuffer(packed, COUNT, num_crops)
    start = int(counts[:position].sum())
    return np.frombuffer(packed, VISIBLE, int(counts[position]), counts.nbytes + start * VISIBLE.itemsize)
