"""The SQLite index of a training set: its volumes, every instance in them, and a regular grid of crops.

This is the reading side. One file, written once by `crop_index_build` and renamed when complete; readers open it
read-only and immutable, which is safe on network file systems.

Must not know: torch, sampling, augmentation, how an index is built.
"""

import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from seg3d_monai.data.crop_grid import CropGrid
from seg3d_monai.data.crop_index_format import (
    COUNT,
    CROP_COLUMNS,
    CROPS_PER_BLOCK,
    CROPS_PER_LIST,
    INSTANCE,
    INSTANCES_PER_BLOCK,
    REBUILD,
    connect_readonly,
    read_meta,
    unpack_visible,
)
from seg3d_monai.data.crop_records import CropRecord, InstanceTable, VolumeRecord
from seg3d_monai.data.crop_selection import CropSelection
from seg3d_monai.data.data_config import DataConfig
from seg3d_monai.data.filters import Column, Filter, Kind, Table, Value
from seg3d_monai.data.intensity import Intensity
from seg3d_monai.data.manifest import SPLITS, ManifestRow, location
from seg3d_monai.data.unreadable import PatchedVolume
from seg3d_monai.data.volume import Volume

_CORNERS = ("z1", "y1", "x1", "z2", "y2", "x2")
_CROP_NAMES = ("num_instances", "foreground_fraction", "ignore_fraction", "crop_id", *_CORNERS)
_VOLUME_NUMBERS = ("volume_instances", "channels", "size_z", "size_y", "size_x")
_SPACINGS = ("spacing_z_um", "spacing_y_um", "spacing_x_um")
_VOLUME_TEXTS = ("name", "specimen", "split", "image", "label")
BUILTIN_COLUMNS = frozenset((*_CROP_NAMES, *_VOLUME_NUMBERS, *_SPACINGS, *_VOLUME_TEXTS))
_BATCH = 1 << 20  # crops that a filter looks at together: bounds its memory


class CropIndex:
    """Read-only access to an index file; may be pickled, forked and shared by threads.

    Args:
        db: path of the file written by `build_index`.

    Attributes:
        path: of the file, absolute.
        config: what it was built with.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an index, or one of another format version.
    """

    def __init__(self, db: str | os.PathLike[str]) -> None:
        self.path = Path(db).absolute()
        self._local = threading.local()
        self.config: DataConfig = read_meta(self.path)["config"]

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
        return self.config.crop_size

    @property
    def stride(self) -> tuple[int, int, int]:
        """Step of the grid, (z, y, x) voxels."""
        return self.config.step

    @property
    def min_voxels(self) -> int:
        """Visible voxels below which a truncated instance is a fragment."""
        return self.config.min_voxels

    @property
    def min_object_voxels(self) -> int:
        """Voxels below which an instance does not count."""
        return self.config.min_object_voxels

    @cached_property
    def num_classes(self) -> int:
        """One more than the largest class; 1 when nothing is labelled."""
        return int(self._query("SELECT COALESCE(MAX(num_classes), 1) FROM volumes")[0][0])

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """The splits that occur, "None" among them where volumes have none."""
        return tuple(sorted({str(row[0]) for row in self._query("SELECT DISTINCT split FROM volumes")}))

    @cached_property
    def columns(self) -> dict[str, Column]:
        """The names that a filter may use: the built-in ones and every attribute of the manifest."""
        columns = {name: Column("number", "crop") for name in _CROP_NAMES}
        columns |= {name: Column("number") for name in (*_VOLUME_NUMBERS, *_SPACINGS)}
        columns |= {name: Column("text") for name in _VOLUME_TEXTS}
        kinds: dict[str, set[Kind]] = {}
        for name, stored in self._query("SELECT DISTINCT name, typeof(value) FROM attributes"):
            kinds.setdefault(name, set()).add("text" if stored == "text" else "number")
        return columns | {name: Column(kind.pop() if len(kind) == 1 else "any") for name, kind in kinds.items()}

    def __len__(self) -> int:
        """Number of crops."""
        return int(self._query("SELECT COALESCE(SUM(num_crops), 0) FROM volumes")[0][0])

    def volumes(
        self, *, where: str | None = None, split: str | None = None, labelled: bool | None = True
    ) -> list[VolumeRecord]:
        """Volumes, in the order of the manifest, that have at least one crop which matches.

        Args:
            where: filter expression over `columns`.
            split: "train", "val" or "test".
            labelled: only those with labels, only those without, or, with None, both.

        Raises:
            ValueError: for a filter or a split that makes no sense.
        """
        found = []
        for records, matches in self._matching(where, split, labelled):
            begin = 0
            for record in records:
                if matches is None or matches[begin : begin + record.num_crops].any():
                    found.append(record)
                begin += record.num_crops
        return found

    def volume(self, volume_id: int) -> VolumeRecord:
        """One volume by its id.

        Raises:
            ValueError: if there is none.
        """
        records = self._volume_records("id = ?", (int(volume_id),))
        if not records:
            raise ValueError(f"volume_id={volume_id} is not in {self.path}; ids come from volumes()")
        return records[0]

    def count(self, *, where: str | None = None, split: str | None = None, labelled: bool | None = True) -> int:
        """How many crops match; arguments as for `volumes`."""
        return sum(
            sum(record.num_crops for record in records) if matches is None else int(np.count_nonzero(matches))
            for records, matches in self._matching(where, split, labelled)
        )

    def select(
        self, *, where: str | None = None, split: str | None = None, labelled: bool | None = True
    ) -> tuple[list[VolumeRecord], CropSelection]:
        """The crops that match, a few bits each, and their volumes; arguments as for `volumes`."""
        volumes: list[VolumeRecord] = []
        matching: list[np.ndarray] = []
        occupied: list[np.ndarray] = []
        is_whole = True
        for records, matches in self._matching(where, split, labelled):
            counts = self._crop_column("num_instances", records) > 0
            found = np.ones(len(counts), bool) if matches is None else matches
            is_whole &= matches is None or bool(matches.all())
            begins = np.cumsum([0, *(record.num_crops for record in records)])
            is_kept = np.logical_or.reduceat(found, begins[:-1])
            volumes += [record for record, kept in zip(records, is_kept, strict=True) if kept]
            inside = np.repeat(is_kept, np.diff(begins))
            matching.append(found[inside])
            occupied.append((found & counts)[inside])
        nothing = [np.zeros(0, bool)]
        selection = CropSelection(
            first_crops=[volume.first_crop for volume in volumes],
            volume_crops=[volume.num_crops for volume in volumes],
            matches=None if is_whole else np.concatenate(matching or nothing),
            occupied=np.concatenate(occupied or nothing),
        )
        return volumes, selection

    def crop_ids(
        self, *, where: str | None = None, split: str | None = None, labelled: bool | None = True
    ) -> np.ndarray:
        """Ids of the crops that match, with their volumes and instance counts; `select` is for millions of them.

        Args:
            where: filter expression over `columns`.
            split: "train", "val" or "test".
            labelled: as for `volumes`.

        Returns:
            int64 [n, 3]: crop id, volume id, num_instances; ascending crop ids.
        """
        parts = [np.zeros((0, 3), np.int64)]
        for records, matches in self._matching(where, split, labelled):
            crops = np.concatenate([np.arange(r.first_crop, r.first_crop + r.num_crops) for r in records])
            volumes = np.repeat([record.id for record in records], [record.num_crops for record in records])
            table = np.stack([crops, volumes, self._crop_column("num_instances", records)], axis=1)
            parts.append(table if matches is None else table[matches])
        return np.concatenate(parts)

    def crop(self, crop_id: int) -> CropRecord:
        """One crop by its id.

        Raises:
            ValueError: if there is none.
        """
        volume, position = self._locate(crop_id)
        block, place = divmod(position, CROPS_PER_BLOCK)
        rows = self._query(
            "SELECT name, data FROM crop_columns WHERE name IN (?, ?, ?) AND volume_id = ? AND block = ?",
            (*CROP_COLUMNS, volume["id"], block),
        )
        found = {row["name"]: row["data"] for row in rows}
        counts, foreground, ignored = (
            int(np.frombuffer(found[name], COUNT, 1, place * COUNT.itemsize)[0]) for name in CROP_COLUMNS
        )
        grid = self.grid((volume["size_z"], volume["size_y"], volume["size_x"]))
        size = prod(grid.extent)
        return CropRecord(
            id=int(crop_id),
            volume_id=volume["id"],
            roi=grid.roi(position),
            num_instances=counts,
            foreground_fraction=foreground / size,
            ignore_fraction=ignored / size,
        )

    def crop_instances(self, crop_id: int) -> InstanceTable:
        """Instances visible in a crop, fragments included; boxes in the crop frame."""
        volume, position = self._locate(crop_id)
        block, place = divmod(position, CROPS_PER_LIST)
        rows = self._query("SELECT rows FROM crop_instances WHERE volume_id = ? AND block = ?", (volume["id"], block))
        if not rows:
            return _instance_table(np.zeros(0, INSTANCE), np.zeros(0, np.int64))
        num_crops = min(CROPS_PER_LIST, volume["num_crops"] - block * CROPS_PER_LIST)
        visible = unpack_visible(rows[0][0], num_crops, place)
        table = self.instances(volume["id"], ids=visible["id"])
        return InstanceTable(
            ids=table.ids,
            labels=table.labels,
            classes=table.classes,
            boxes=visible["box"].astype(np.int64),
            voxels=visible["voxels"].astype(np.int64),
            truncated=visible["voxels"] < table.voxels,
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
        wanted, wanted_labels = _sorted_ids(ids), _sorted_ids(labels)
        blocks: np.ndarray | None = None
        if wanted is not None:
            blocks = np.unique((wanted - 1) // INSTANCES_PER_BLOCK)
        if wanted_labels is not None:
            first_labels = self._first_labels(int(volume_id))
            of_labels = np.unique(np.searchsorted(first_labels, wanted_labels, side="right") - 1)
            blocks = of_labels if blocks is None else np.intersect1d(blocks, of_labels)
        sql, parameters = "SELECT block, rows FROM instances WHERE volume_id = ?", [int(volume_id)]
        if blocks is not None:
            sql += f" AND block IN ({', '.join('?' * len(blocks))})"
            parameters += blocks.tolist()
        found = self._query(sql + " ORDER BY block", parameters)
        table = np.frombuffer(b"".join([row["rows"] for row in found]), INSTANCE)
        firsts = np.array([row["block"] * INSTANCES_PER_BLOCK + 1 for row in found], np.int64)
        # Every block is full but the last one of a volume.
        known = np.add.outer(firsts, np.arange(INSTANCES_PER_BLOCK)).reshape(-1)[: len(table)]
        if wanted is not None:
            places = np.searchsorted(known, wanted)
            places = places[known[np.minimum(places, len(known) - 1)] == wanted] if len(known) else places[:0]
            table, known = table[places], known[places]
        if wanted_labels is not None:
            is_kept = np.isin(table["label"], wanted_labels)
            table, known = table[is_kept], known[is_kept]
        return _instance_table(table, known)

    def grid(self, shape: Sequence[int]) -> CropGrid:
        """The grid of crops over a volume of (z, y, x) voxels."""
        return _grid(tuple(shape), self.crop_size, self.stride)

    def open_image(self, record: VolumeRecord) -> Volume:
        """Open a volume's image.

        Raises:
            FileNotFoundError: if it is gone.
            ValueError: if it has another shape than when the index was built.
        """
        return _expect(_row(record).open_image(), record.shape, record)

    def open_label(self, record: VolumeRecord) -> Volume:
        """Open a volume's labels; what the index knows to be damaged reads as ignore. Raises as `open_image`.

        Raises:
            ValueError: also if it has no labels.
        """
        label = _expect(_row(record).open_label(), (1, *record.shape[1:]), record)
        return PatchedVolume(label, record.unreadable, int(np.iinfo(label.dtype).max)) if record.unreadable else label

    def open_ignore(self, record: VolumeRecord) -> Volume | None:
        """Open a volume's mask, in which voxels other than 0 are ignored; None without one. Raises as `open_image`."""
        mask = _row(record).open_ignore()
        if mask is None:
            return None
        mask = _expect(mask, (1, *record.shape[1:]), record)
        return PatchedVolume(mask, record.unreadable, 1) if record.unreadable else mask

    def _matching(
        self, where: str | None, split: str | None, labelled: bool | None
    ) -> Iterator[tuple[list[VolumeRecord], np.ndarray | None]]:
        """Volumes that may match, some at a time, and which of their crops do, one after the other; None for all."""
        if split is not None and split not in SPLITS:
            raise ValueError(f"split={split!r} is unknown; use one of {', '.join(SPLITS)}")
        condition = Filter(where, self.columns) if where is not None and where.strip() else None
        records = [
            record
            for record in self._volume_records()
            if (split is None or record.split == split) and (labelled is None or (record.label is not None) == labelled)
        ]
        before = 0
        batches: list[int] = []
        for record in records:
            batches.append(before // _BATCH)
            before += record.num_crops
        for _, pairs in groupby(zip(batches, records, strict=True), key=lambda pair: pair[0]):
            batch = [record for _, record in pairs]
            if condition is None:
                yield batch, None
                continue
            matches = condition(self._table(batch, condition))
            if condition.level == "crop":
                yield batch, matches
            elif matches.any():
                yield [record for record, is_match in zip(batch, matches, strict=True) if is_match], None

    def _table(self, records: Sequence[VolumeRecord], condition: Filter) -> Table:
        """The columns that a filter asks for."""
        volumes = {name: [_volume_value(r, name) for r in records] for name in condition.names - set(_CROP_NAMES)}
        crops: dict[str, np.ndarray] = {}
        for name in condition.names & {*_CROP_NAMES}:
            if name in _CORNERS:
                axis, end = "zyx".index(name[0]), int(name[1]) - 1
                parts = []
                for record in records:
                    grid = self.grid(record.shape[1:])
                    parts.append(grid.corners()[:, axis] + end * grid.extent[axis])
                crops[name] = np.concatenate(parts)
            elif name == "crop_id":
                crops[name] = np.concatenate([np.arange(r.first_crop, r.first_crop + r.num_crops) for r in records])
            elif name == "num_instances":
                crops[name] = self._crop_column(name, records)
            else:
                column = "foreground_voxels" if name == "foreground_fraction" else "ignored_voxels"
                sizes = [prod(self.grid(record.shape[1:]).extent) for record in records]
                counts = [record.num_crops for record in records]
                crops[name] = self._crop_column(column, records) / np.repeat(sizes, counts)
        return Table(volumes, crops, [record.num_crops for record in records])

    def _crop_column(self, name: str, records: Sequence[VolumeRecord]) -> np.ndarray:
        """A stored column of all crops of some volumes, one after the other."""
        if not records:
            return np.zeros(0, COUNT)
        wanted = {record.id for record in records}
        found = self._query(
            "SELECT volume_id, data FROM crop_columns WHERE name = ? AND volume_id BETWEEN ? AND ? "
            "ORDER BY volume_id, block",
            (name, min(wanted), max(wanted)),
        )
        return np.frombuffer(b"".join(row["data"] for row in found if row["volume_id"] in wanted), COUNT)

    def _locate(self, crop_id: int) -> tuple[sqlite3.Row, int]:
        """The volume of a crop (id, sizes, first_crop, num_crops), and the crop's number on its grid."""
        rows = self._query(
            "SELECT id, size_z, size_y, size_x, first_crop, num_crops FROM volumes WHERE first_crop <= ? "
            "ORDER BY first_crop DESC LIMIT 1",
            (int(crop_id),),
        )
        if not rows or crop_id >= rows[0]["first_crop"] + rows[0]["num_crops"]:
            raise ValueError(f"crop_id={crop_id} is not in {self.path}; ids are 1 to {len(self)}")
        return rows[0], int(crop_id) - rows[0]["first_crop"]

    def _first_labels(self, volume_id: int) -> np.ndarray:
        """The first id on disk of every block of instances, which are sorted by it."""
        rows = self._query(
            "SELECT substr(rows, 1, ?) FROM instances WHERE volume_id = ? ORDER BY block",
            (INSTANCE["label"].itemsize, volume_id),
        )
        return np.frombuffer(b"".join(row[0] for row in rows), INSTANCE["label"])

    def _query(self, sql: str, parameters: Sequence[Any] = ()) -> list[sqlite3.Row]:
        # A connection must not cross a fork, nor be used by two threads at once.
        if getattr(self._local, "pid", None) != os.getpid():
            self._local.connection = connect_readonly(self.path)
            self._local.pid = os.getpid()
        return list(self._local.connection.execute(sql, tuple(parameters)))

    def _volume_records(self, condition: str = "1", parameters: Sequence[Any] = ()) -> list[VolumeRecord]:
        rows = self._query(f"SELECT * FROM volumes WHERE {condition} ORDER BY id", parameters)
        attributes: dict[int, dict[str, str | float | int]] = {row["id"]: {} for row in rows}
        for volume_id, name, value in self._query(
            "SELECT volume_id, name, value FROM attributes "
            f"WHERE volume_id IN (SELECT id FROM volumes WHERE {condition}) ORDER BY volume_id, name",
            parameters,
        ):
            attributes[volume_id][name] = value
        return [_volume_record(row, attributes[row["id"]]) for row in rows]


@lru_cache(maxsize=1024)
def _grid(shape: tuple[int, ...], crop_size: tuple[int, ...], stride: tuple[int, ...]) -> CropGrid:
    return CropGrid(shape, crop_size, stride)


def _row(record: VolumeRecord) -> ManifestRow:
    """The manifest's row again, which knows how images and labels are opened."""
    return ManifestRow(
        name=record.name,
        image=location(record.image),
        label=None if record.label is None else location(record.label),
        ignore=None if record.ignore is None else location(record.ignore),
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
            f"{REBUILD}"
        )
    return volume


def _volume_value(record: VolumeRecord, name: str) -> Value | None:
    """What a column of volumes holds, None where it is missing."""
    if name in _SPACINGS:
        return None if record.spacing_um is None else record.spacing_um[_SPACINGS.index(name)]
    if name in _VOLUME_TEXTS:
        text: str | None = getattr(record, name)
        return text
    if name == "volume_instances":
        return record.num_instances
    if name in _VOLUME_NUMBERS:
        return record.shape[_VOLUME_NUMBERS.index(name) - 1]
    return record.attributes.get(name)


def _volume_record(row: sqlite3.Row, attributes: dict[str, str | float | int]) -> VolumeRecord:
    spacing = tuple(row[name] for name in _SPACINGS)
    return VolumeRecord(
        shape=(row["channels"], row["size_z"], row["size_y"], row["size_x"]),
        spacing_um=None if None in spacing else spacing,
        intensity=Intensity.from_json(json.loads(row["intensity"])),
        unreadable=tuple(tuple(roi) for roi in json.loads(row["unreadable"])),
        attributes=attributes,
        **{
            name: row[name]
            for name in ("id", "name", "image", "label", "ignore", "axes", "specimen", "split")
            + ("num_instances", "first_crop", "num_crops")
        },
    )


def _sorted_ids(ids: Iterable[int] | None) -> np.ndarray | None:
    """Distinct ids, ascending."""
    if ids is None:
        return None
    return np.unique(np.asarray(ids if isinstance(ids, np.ndarray) else list(ids)).astype(np.int64))


def _instance_table(table: np.ndarray, ids: np.ndarray) -> InstanceTable:
    return InstanceTable(
        ids=ids,
        labels=table["label"].astype(np.int64),
        classes=table["class"].astype(np.int64),
        boxes=table["box"].astype(np.int64).reshape(-1, 6),
        voxels=table["voxels"].astype(np.int64),
        truncated=np.zeros(len(table), bool),
    )
