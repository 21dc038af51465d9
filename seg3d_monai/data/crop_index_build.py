"""Builds the SQLite crop index: one streaming pass over each volume, written aside and renamed when complete.

Rollback journal, never WAL; one process writes. The index keeps what it was built from: `build_index` reuses a file
that matches exactly and rebuilds any other, so a stale index is never used silently, and an interrupted build leaves
nothing behind.

Must not know: torch, sampling, augmentation.
"""

import hashlib
import json
import logging
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from seg3d_monai.data.crop_index import BUILTIN_COLUMNS, FORMAT_VERSION, CropIndex, read_config
from seg3d_monai.data.intensity import check_finite, measure_intensity
from seg3d_monai.data.label_scan import LabelScan
from seg3d_monai.data.manifest import Manifest, ManifestRow, read_manifest
from seg3d_monai.data.volume import Volume

logger = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE volumes (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, image TEXT NOT NULL, label TEXT NOT NULL, axes TEXT,
    channels INTEGER NOT NULL, size_z INTEGER NOT NULL, size_y INTEGER NOT NULL, size_x INTEGER NOT NULL,
    spacing_z_um REAL, spacing_y_um REAL, spacing_x_um REAL,
    specimen TEXT NOT NULL, split TEXT, intensity TEXT NOT NULL,
    num_instances INTEGER NOT NULL DEFAULT 0, first_crop INTEGER NOT NULL, num_crops INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE attributes (
    volume_id INTEGER NOT NULL, name TEXT NOT NULL, value NOT NULL, PRIMARY KEY (volume_id, name)
) WITHOUT ROWID;
CREATE TABLE instances (
    volume_id INTEGER NOT NULL, id INTEGER NOT NULL, label INTEGER NOT NULL, class INTEGER NOT NULL,
    z1 INTEGER NOT NULL, y1 INTEGER NOT NULL, x1 INTEGER NOT NULL,
    z2 INTEGER NOT NULL, y2 INTEGER NOT NULL, x2 INTEGER NOT NULL,
    voxels INTEGER NOT NULL, PRIMARY KEY (volume_id, id)
) WITHOUT ROWID;
CREATE UNIQUE INDEX instance_labels ON instances (volume_id, label);
CREATE TABLE crops (
    id INTEGER PRIMARY KEY, volume_id INTEGER NOT NULL,
    z1 INTEGER NOT NULL, y1 INTEGER NOT NULL, x1 INTEGER NOT NULL,
    z2 INTEGER NOT NULL, y2 INTEGER NOT NULL, x2 INTEGER NOT NULL,
    num_instances INTEGER NOT NULL DEFAULT 0, foreground_fraction REAL NOT NULL, ignore_fraction REAL NOT NULL
);
CREATE INDEX crop_volumes ON crops (volume_id);
CREATE TABLE crop_instances (
    crop_id INTEGER NOT NULL, label INTEGER NOT NULL, id INTEGER NOT NULL DEFAULT 0, class INTEGER NOT NULL DEFAULT 0,
    z1 INTEGER NOT NULL, y1 INTEGER NOT NULL, x1 INTEGER NOT NULL,
    z2 INTEGER NOT NULL, y2 INTEGER NOT NULL, x2 INTEGER NOT NULL,
    voxels INTEGER NOT NULL, truncated INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (crop_id, label)
) WITHOUT ROWID;
"""


def build_index(
    manifest: Manifest | str | os.PathLike[str],
    db: str | os.PathLike[str],
    *,
    crop_size: Sequence[int],
    stride: Sequence[int] | None = None,
    min_voxels: int = 20,
    percentiles: tuple[float, float] = (1.0, 99.8),
    progress: bool = True,
) -> CropIndex:
    """Build the crop index of a manifest, or reuse the file if it was built from exactly the same things.

    Args:
        manifest: a manifest, or the path of one. Rows without a label volume are left out, with a warning.
        db: path of the index file.
        crop_size: extent of a crop, (z, y, x) voxels.
        stride: step of the grid, (z, y, x) voxels; half the crop size by default.
        min_voxels: visible voxels below which a truncated instance is a fragment and does not count.
        percentiles: of the intensity, mapped to 0 and 1 by the normalisation.
        progress: whether to show a progress bar.

    Returns:
        The index, opened.

    Raises:
        ValueError: for a size that makes no sense, for labels that are not ids, for image and label of different
            shapes, for voxels that are not finite, and for a manifest without labels.
    """
    if not isinstance(manifest, Manifest):
        manifest = read_manifest(manifest)
    crop = _triple(crop_size, "crop_size")
    step = tuple(max(1, c // 2) for c in crop) if stride is None else _triple(stride, "stride")
    if any(s > c for s, c in zip(step, crop, strict=True)):
        raise ValueError(f"stride={step} is larger than crop_size={crop}; voxels in between would be in no crop")
    if min_voxels < 0:
        raise ValueError(f"min_voxels={min_voxels} is negative; use 0 to keep every fragment")
    rows = [row for row in manifest.rows if row.label is not None]
    bare = [row.name for row in manifest.rows if row.label is None]
    if bare:
        logger.warning("left out of the index for want of a label volume: %s", ", ".join(bare))
    if not rows:
        raise ValueError("no row of the manifest has a label volume; fill the column 'label'")
    _check_attributes(rows)

    target = Path(db).absolute()
    volumes = [(row.open_image(), row.open_label()) for row in rows]
    config = {
        "format": FORMAT_VERSION,
        "crop_size": list(crop),
        "stride": list(step),
        "min_voxels": int(min_voxels),
        "percentiles": [float(p) for p in percentiles],
        "manifest": hashlib.sha256(json.dumps([_row_json(row) for row in rows]).encode()).hexdigest(),
        "stats": [[_stat(image), _stat(label)] for image, label in volumes],
    }
    if target.exists() and _is_current(target, config, volumes):
        return CropIndex(target)
    config["identities"] = _identities(volumes)
    _write_index(target, rows, volumes, config, progress)
    return CropIndex(target)


def _is_current(target: Path, config: Mapping[str, Any], volumes: Sequence[tuple[Volume, Volume]]) -> bool:
    """Whether the index was built from the same things; says why not."""
    try:
        found = read_config(target)
    except ValueError as error:
        logger.warning("rebuilding the crop index: %s", error)
        return False
    changed = [key for key in config if key != "stats" and config[key] != found.get(key)]
    # Equal size and time of every file settle it; else (folders, copies) the voxels are looked at.
    settled = config["stats"] == found.get("stats") and all(None not in pair for pair in config["stats"])
    if not changed and not settled and found.get("identities") != _identities(volumes):
        changed = ["images or labels"]
    if changed:
        logger.warning("rebuilding the crop index %s: changed since it was built: %s", target, ", ".join(changed))
    return not changed


def _identities(volumes: Sequence[tuple[Volume, Volume]]) -> Any:
    # Through JSON, so that it compares equal with what is read back.
    return json.loads(json.dumps([[image.identity(), label.identity()] for image, label in volumes]))


def _stat(volume: Volume) -> list[int] | None:
    assert volume.path is not None
    if not os.path.isfile(volume.path):
        return None  # a folder's own time says nothing about the chunks in it
    found = os.stat(volume.path)
    return [found.st_size, found.st_mtime_ns]


def _write_index(
    target: Path,
    rows: Sequence[ManifestRow],
    volumes: Sequence[tuple[Volume, Volume]],
    config: Mapping[str, Any],
    progress: bool,
) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".building", dir=target.parent)
    os.close(handle)
    building = Path(name)
    try:
        connection = sqlite3.connect(building, isolation_level=None)
        try:
            # Nothing reads the file before the rename, so its journal guards nothing and one sync at the end is enough.
            for pragma in ("journal_mode = MEMORY", "synchronous = OFF", "cache_size = -65536"):
                connection.execute(f"PRAGMA {pragma}")
            connection.execute("BEGIN")
            for statement in filter(str.strip, _SCHEMA.split(";")):
                connection.execute(statement)
            connection.execute("INSERT INTO meta VALUES ('config', ?)", (json.dumps(config),))
            with tqdm(total=len(rows), desc="index", unit="volume", disable=not progress) as bar:
                for volume_id, (row, (image, label)) in enumerate(zip(rows, volumes, strict=True), start=1):
                    bar.set_postfix_str(row.name, refresh=False)
                    _write_volume(connection, volume_id, row, image, label, config)
                    bar.update()
            connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
            connection.execute("COMMIT")
            connection.execute("ANALYZE")
        finally:
            connection.close()
        with building.open("rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        building.chmod(0o666 & ~umask)  # mkstemp is private, an index is as shared as its folder
        building.replace(target)
    finally:
        building.unlink(missing_ok=True)
        Path(f"{building}-journal").unlink(missing_ok=True)


def _write_volume(
    connection: sqlite3.Connection,
    volume_id: int,
    row: ManifestRow,
    image: Volume,
    label: Volume,
    config: Mapping[str, Any],
) -> None:
    if tuple(image.shape[1:]) != tuple(label.shape[1:]):
        raise ValueError(
            f"{row.name}: the image is {tuple(image.shape[1:])} and the labels are {tuple(label.shape[1:])} (z, y, x); "
            "they must be the same voxels"
        )
    check_finite(image)
    low, high = config["percentiles"]
    intensity = measure_intensity(image, percentiles=(low, high))
    first_crop = connection.execute("SELECT COALESCE(MAX(id), 0) + 1 FROM crops").fetchone()[0]
    spacing = row.spacing_um or image.spacing_um or (None, None, None)
    connection.execute(
        "INSERT INTO volumes (id, name, image, label, axes, channels, size_z, size_y, size_x, "
        "spacing_z_um, spacing_y_um, spacing_x_um, specimen, split, intensity, first_crop) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(volume_id, row.name, str(Path(row.image).absolute()), str(Path(str(row.label)).absolute()), row.axes),
            *(int(n) for n in image.shape),
            *spacing,
            *(row.specimen, row.split, json.dumps(intensity.to_json()), first_crop),
        ),
    )
    connection.executemany(
        "INSERT INTO attributes VALUES (?, ?, ?)", [(volume_id, name, value) for name, value in row.attributes.items()]
    )
    scan = LabelScan(label=label, crop_size=config["crop_size"], stride=config["stride"], name=row.name)
    num_crops = 0
    for crop_id, crop in enumerate(scan, start=first_crop):
        num_crops += 1
        size = int(np.prod([crop.box[axis + 3] - crop.box[axis] for axis in range(3)]))
        connection.execute(
            "INSERT INTO crops (id, volume_id, z1, y1, x1, z2, y2, x2, foreground_fraction, ignore_fraction) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (crop_id, volume_id, *crop.box, crop.foreground / size, crop.ignored / size),
        )
        local = crop.rows - np.array([0, 0, *crop.box[:3], *crop.box[:3]])
        connection.executemany(
            "INSERT INTO crop_instances (crop_id, label, voxels, z1, y1, x1, z2, y2, x2) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [(crop_id, *values) for values in local.tolist()],
        )
    labels = scan.instances[:, 0]
    connection.executemany(
        "INSERT INTO instances (volume_id, id, label, class, voxels, z1, y1, x1, z2, y2, x2) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (volume_id, rank, values[0], class_id, *values[1:])
            for rank, (values, class_id) in enumerate(
                zip(scan.instances.tolist(), _classes_of(row, labels), strict=True), start=1
            )
        ],
    )
    crops = (volume_id, first_crop, first_crop + num_crops)
    connection.execute(
        "UPDATE crop_instances SET (id, class, truncated) = (SELECT i.id, i.class, crop_instances.voxels < i.voxels "
        "FROM instances AS i WHERE i.volume_id = ? AND i.label = crop_instances.label) "
        "WHERE crop_id >= ? AND crop_id < ?",
        crops,
    )
    connection.execute(
        "UPDATE crops SET num_instances = (SELECT COUNT(*) FROM crop_instances AS c WHERE c.crop_id = crops.id "
        "AND (NOT c.truncated OR c.voxels >= ?)) WHERE id >= ? AND id < ?",
        (config["min_voxels"], *crops[1:]),
    )
    connection.execute(
        "UPDATE volumes SET num_instances = ?, num_crops = ? WHERE id = ?", (len(labels), num_crops, volume_id)
    )


def _classes_of(row: ManifestRow, labels: np.ndarray) -> list[int]:
    if isinstance(row.classes, Mapping):
        missing = [int(label) for label in labels if int(label) not in row.classes]
        if missing:
            shown = f"{missing[:10]}{' …' if len(missing) > 10 else ''}"
            raise ValueError(f"{row.name}: label ids {shown} have no class; add them to the class table")
        return [int(row.classes[int(label)]) for label in labels]
    return [int(row.classes)] * len(labels)


def _check_attributes(rows: Iterable[ManifestRow]) -> None:
    names = {name for row in rows for name in row.attributes}
    taken = sorted(names & BUILTIN_COLUMNS)
    if taken:
        raise ValueError(f"manifest columns {', '.join(taken)} are names of the index itself; rename them")


def _row_json(row: ManifestRow) -> list[Any]:
    classes = sorted(row.classes.items()) if isinstance(row.classes, Mapping) else row.classes
    paths = [str(Path(row.image).absolute()), str(Path(str(row.label)).absolute())]
    attributes = sorted(row.attributes.items())
    return [row.name, *paths, row.axes, row.spacing_um, row.specimen, row.split, classes, attributes]


def _triple(value: Sequence[int], name: str) -> tuple[int, int, int]:
    numbers = tuple(int(n) for n in value)
    if len(numbers) != 3 or any(n < 1 for n in numbers):
        raise ValueError(f"{name}={value} is not three positive voxel counts; give (z, y, x)")
    return numbers
