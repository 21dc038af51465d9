"""The SQLite index of a training set: its volumes, every instance in them, and a regular grid of crops.

This is the reading side. One file, written once by `crop_index_build` and renamed when complete; readers open it
read-only and immutable, which is safe on network file systems.

Must not know: torch, sampling, augmentation, how an index is built.
"""

import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from seg3d_monai.data.filters import Column, Kind, compile_filter
from seg3d_monai.data.intensity import Intensity
from seg3d_monai.data.manifest import SPLITS, ManifestRow
from seg3d_monai.data.volume import Volume

FORMAT_VERSION = 1

_NUMBER_COLUMNS = {
    "num_instances": "crops.num_instances",
    "foreground_fraction": "crops.foreground_fraction",
    "ignore_fraction": "crops.ignore_fraction",
    **{name: f"crops.{name}" for name in ("z1", "y1", "x1", "z2", "y2", "x2")},
    "crop_id": "crops.id",
    "volume_instances": "volumes.num_instances",
    **{name: f"volumes.{name}" for name in ("channels", "size_z", "size_y", "size_x")},
    **{name: f"volumes.{name}" for name in ("spacing_z_um", "spacing_y_um", "spacing_x_um")},
}
_TEXT_COLUMNS = {name: f"volumes.{name}" for name in ("name", "specimen", "split", "image", "label")}
BUILTIN_COLUMNS = frozenset(_NUMBER_COLUMNS) | frozenset(_TEXT_COLUMNS)


@dataclass(frozen=True)
class VolumeRecord:
    """One volume of the index.

    Args:
        id: from 1, in the order of the manifest.
        name: unique name.
        image: path of the image.
        label: path of the label volume.
        axes: axes of the image as the manifest gives them.
        shape: (C, Z, Y, X) voxels.
        spacing_um: (z, y, x) micrometres per voxel, None when unknown.
        specimen: what the split must not cut.
        split: "train", "val", "test" or None.
        intensity: normalisation measured on the whole image.
        num_instances: instances, whose ids are 1..num_instances.
        first_crop: id of its first crop.
        num_crops: crops on its grid, with consecutive ids.
        attributes: quality_* and free columns of the manifest.
    """

    id: int
    name: str
    image: str
    label: str
    axes: str | None
    shape: tuple[int, int, int, int]
    spacing_um: tuple[float, float, float] | None
    specimen: str
    split: str | None
    intensity: Intensity
    num_instances: int
    first_crop: int
    num_crops: int
    attributes: dict[str, str | float | int]


@dataclass(frozen=True)
class CropRecord:
    """One crop of the grid.

    Args:
        id: from 1.
        volume_id: its volume.
        roi: (z1, y1, x1, z2, y2, x2) in the volume frame; smaller than the crop size only where the volume is.
        num_instances: instances that are not fragments (whole, or at least min_voxels visible).
        foreground_fraction: labelled voxels over all voxels.
        ignore_fraction: ignored voxels over all voxels.
    """

    id: int
    volume_id: int
    roi: tuple[int, int, int, int, int, int]
    num_instances: int
    foreground_fraction: float
    ignore_fraction: float


@dataclass(frozen=True)
class InstanceTable:
    """Instances of a volume or of a crop, n rows by ascending id.

    Args:
        ids: int64 [n], compact within the volume, from 1.
        labels: int64 [n], the ids on disk.
        classes: int64 [n], from 0.
        boxes: int64 [n, 6], half-open, in the volume frame or the crop frame.
        voxels: int64 [n], all of them or those visible in the crop.
        truncated: bool [n], whether the crop cuts the instance; all False for a volume.
    """

    ids: np.ndarray
    labels: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray
    voxels: np.ndarray
    truncated: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


class CropIndex:
    """Read-only access to an index file; may be pickled, forked and shared by threads.

    Args:
        db: path of the file written by `build_index`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an index, or one of another format version.
    """

    def __init__(self, db: str | os.PathLike[str]) -> None:
        self.path = Path(db).absolute()
        self._local = threading.local()
        self.config = read_config(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

    def __repr__(self) -> str:
        return f"CropIndex({str(self.path)!r})"

    @property
    def crop_size(self) -> tuple[int, int, int]:
        """Extent of a crop, (z, y, x) voxels."""
        z, y, x = self.config["crop_size"]
        return (z, y, x)

    @property
    def stride(self) -> tuple[int, int, int]:
        """Step of the grid, (z, y, x) voxels."""
        z, y, x = self.config["stride"]
        return (z, y, x)

    @property
    def min_voxels(self) -> int:
        """Visible voxels below which a truncated instance is a fragment."""
        return int(self.config["min_voxels"])

    @cached_property
    def num_classes(self) -> int:
        """One more than the largest class; 1 when nothing is labelled."""
        return int(self._query("SELECT COALESCE(MAX(class), 0) + 1 FROM instances")[0][0])

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """The splits that occur, "None" among them where volumes have none."""
        return tuple(sorted({str(row[0]) for row in self._query("SELECT DISTINCT split FROM volumes")}))

    @cached_property
    def columns(self) -> dict[str, Column]:
        """The names that a filter may use: the built-in ones and every attribute of the manifest."""
        return _filter_columns(self._query("SELECT DISTINCT name, typeof(value) FROM attributes"))

    def __len__(self) -> int:
        """Number of crops."""
        return int(self._query("SELECT COUNT(*) FROM crops")[0][0])

    def volumes(self, *, where: str | None = None, split: str | None = None) -> list[VolumeRecord]:
        """Volumes, in the order of the manifest, that have at least one crop which matches.

        Args:
            where: filter expression over `columns`.
            split: "train", "val" or "test".

        Raises:
            ValueError: for a filter or a split that makes no sense.
        """
        condition, parameters = self._condition(where, split)
        rows = self._query(
            "SELECT * FROM volumes WHERE id IN (SELECT DISTINCT crops.volume_id FROM crops "
            f"JOIN volumes ON volumes.id = crops.volume_id WHERE {condition}) ORDER BY id",
            parameters,
        )
        return self._volume_records(rows)

    def volume(self, volume_id: int) -> VolumeRecord:
        """One volume by its id.

        Raises:
            ValueError: if there is none.
        """
        records = self._volume_records(self._query("SELECT * FROM volumes WHERE id = ?", (int(volume_id),)))
        if not records:
            raise ValueError(f"volume_id={volume_id} is not in {self.path}; ids come from volumes()")
        return records[0]

    def crop_ids(self, *, where: str | None = None, split: str | None = None) -> np.ndarray:
        """Ids of the crops that match, with their volumes and instance counts.

        Args:
            where: filter expression over `columns`.
            split: "train", "val" or "test".

        Returns:
            int64 [n, 3]: crop id, volume id, num_instances; ascending crop ids.
        """
        condition, parameters = self._condition(where, split)
        rows = self._query(
            "SELECT crops.id, crops.volume_id, crops.num_instances FROM crops "
            f"JOIN volumes ON volumes.id = crops.volume_id WHERE {condition} ORDER BY crops.id",
            parameters,
        )
        return np.array([tuple(row) for row in rows], np.int64).reshape(-1, 3)

    def crop(self, crop_id: int) -> CropRecord:
        """One crop by its id.

        Raises:
            ValueError: if there is none.
        """
        rows = self._query("SELECT * FROM crops WHERE id = ?", (int(crop_id),))
        if not rows:
            raise ValueError(f"crop_id={crop_id} is not in {self.path}; ids are 1 to {len(self)}")
        row = rows[0]
        return CropRecord(
            id=row["id"],
            volume_id=row["volume_id"],
            roi=(row["z1"], row["y1"], row["x1"], row["z2"], row["y2"], row["x2"]),
            num_instances=row["num_instances"],
            foreground_fraction=row["foreground_fraction"],
            ignore_fraction=row["ignore_fraction"],
        )

    def crop_instances(self, crop_id: int) -> InstanceTable:
        """Instances visible in a crop, fragments included; boxes in the crop frame."""
        return _instance_table(
            self._query(
                "SELECT id, label, class, z1, y1, x1, z2, y2, x2, voxels, truncated FROM crop_instances "
                "WHERE crop_id = ? ORDER BY id",
                (int(crop_id),),
            )
        )

    def instances(
        self, volume_id: int, *, ids: Iterable[int] | None = None, labels: Iterable[int] | None = None
    ) -> InstanceTable:
        """Instances of a volume; boxes in the volume frame.

        Args:
            volume_id: the volume.
            ids: only those with these compact ids.
            labels: only those with these ids on disk.
        """
        sql = (
            "SELECT id, label, class, z1, y1, x1, z2, y2, x2, voxels, 0 AS truncated FROM instances WHERE volume_id = ?"
        )
        parameters: list[Any] = [int(volume_id)]
        for column, wanted in (("id", ids), ("label", labels)):
            if wanted is not None:
                sql += f" AND {column} IN (SELECT value FROM json_each(?))"
                parameters.append(json.dumps([int(value) for value in wanted]))
        return _instance_table(self._query(sql + " ORDER BY id", parameters))

    def open_image(self, record: VolumeRecord) -> Volume:
        """Open a volume's image.

        Raises:
            FileNotFoundError: if it is gone.
            ValueError: if it has another shape than when the index was built.
        """
        return _expect(_row(record).open_image(), record.shape, record)

    def open_label(self, record: VolumeRecord) -> Volume:
        """Open a volume's labels; raises as `open_image`."""
        return _expect(_row(record).open_label(), (1, *record.shape[1:]), record)

    def _condition(self, where: str | None, split: str | None) -> tuple[str, tuple[Any, ...]]:
        condition = "(1)"
        parameters: tuple[Any, ...] = ()
        if where is not None and where.strip():
            condition, parameters = compile_filter(where, self.columns)
        if split is not None:
            if split not in SPLITS:
                raise ValueError(f"split={split!r} is unknown; use one of {', '.join(SPLITS)}")
            condition, parameters = f"({condition} AND volumes.split = ?)", (*parameters, split)
        return condition, parameters

    def _query(self, sql: str, parameters: Sequence[Any] = ()) -> list[sqlite3.Row]:
        # A connection must not cross a fork, nor be used by two threads at once.
        if getattr(self._local, "pid", None) != os.getpid():
            self._local.connection = _connect(self.path)
            self._local.pid = os.getpid()
        return list(self._local.connection.execute(sql, tuple(parameters)))

    def _volume_records(self, rows: Sequence[sqlite3.Row]) -> list[VolumeRecord]:
        attributes: dict[int, dict[str, str | float | int]] = {row["id"]: {} for row in rows}
        for volume_id, name, value in self._query("SELECT volume_id, name, value FROM attributes ORDER BY name"):
            if volume_id in attributes:
                attributes[volume_id][name] = value
        return [_volume_record(row, attributes[row["id"]]) for row in rows]


def _row(record: VolumeRecord) -> ManifestRow:
    """The manifest's row again, which knows how images and labels are opened."""
    return ManifestRow(
        name=record.name,
        image=Path(record.image),
        label=Path(record.label),
        axes=record.axes,
        spacing_um=record.spacing_um,
        specimen=record.specimen,
        split=record.split,
        classes=0,
    )


def _expect(volume: Volume, shape: tuple[int, int, int, int], record: VolumeRecord) -> Volume:
    if tuple(volume.shape) != shape:
        raise ValueError(
            f"{record.name}: {volume.path} has shape {tuple(volume.shape)}, the index knows {shape} (c, z, y, x); "
            "build the index again"
        )
    return volume


def _connect(path: Path) -> sqlite3.Connection:
    # Objects of sqlite3 may be collected by another thread than their own; queries never cross threads.
    connection = sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    return connection


def read_config(path: Path) -> dict[str, Any]:
    """What the index at `path` was built from; raises as `CropIndex`."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no crop index at {path}; build it with `seg3d index MANIFEST DB`")
    connection = _connect(path)
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        row = connection.execute("SELECT value FROM meta WHERE key = 'config'").fetchone()
    except sqlite3.DatabaseError:
        raise ValueError(f"{path} is not a crop index; build it with `seg3d index MANIFEST DB`") from None
    finally:
        connection.close()
    if version != FORMAT_VERSION or row is None:
        raise ValueError(f"{path} has index format {version}, this version reads {FORMAT_VERSION}; build it again")
    config: dict[str, Any] = json.loads(row[0])
    return config


def _volume_record(row: sqlite3.Row, attributes: dict[str, str | float | int]) -> VolumeRecord:
    spacing = (row["spacing_z_um"], row["spacing_y_um"], row["spacing_x_um"])
    return VolumeRecord(
        shape=(row["channels"], row["size_z"], row["size_y"], row["size_x"]),
        spacing_um=None if None in spacing else spacing,
        intensity=Intensity.from_json(json.loads(row["intensity"])),
        attributes=attributes,
        **{
            name: row[name]
            for name in ("id", "name", "image", "label", "axes", "specimen", "split")
            + ("num_instances", "first_crop", "num_crops")
        },
    )


def _instance_table(rows: Sequence[sqlite3.Row]) -> InstanceTable:
    table = np.array([tuple(row) for row in rows], np.int64).reshape(-1, 11)
    return InstanceTable(
        ids=table[:, 0],
        labels=table[:, 1],
        classes=table[:, 2],
        boxes=table[:, 3:9],
        voxels=table[:, 9],
        truncated=table[:, 10].astype(bool),
    )


def _filter_columns(attributes: Iterable[Sequence[str]]) -> dict[str, Column]:
    columns = {name: Column(sql, "number") for name, sql in _NUMBER_COLUMNS.items()}
    columns |= {name: Column(sql, "text") for name, sql in _TEXT_COLUMNS.items()}
    kinds: dict[str, set[Kind]] = {}
    for name, stored in attributes:
        kinds.setdefault(name, set()).add("text" if stored == "text" else "number")
    for name, kind in kinds.items():
        sql = "(SELECT value FROM attributes WHERE attributes.volume_id = volumes.id AND attributes.name = ?)"
        columns[name] = Column(sql, kind.pop() if len(kind) == 1 else "any", (name,))
    return columns
