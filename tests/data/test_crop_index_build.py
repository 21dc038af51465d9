"""Building the crop index: reuse, additions, kills, damage, a full disk, several processes. A dump is the truth."""

import errno
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from crop_toys import image_volume, label_volume, write_dataset
from process_table import is_alive

from seg3d_monai.data import (
    CropIndex,
    DataConfig,
    Manifest,
    build_index,
    crop_index_build,
    crop_index_journal,
    crop_index_scan,
    read_manifest,
)

CONFIG = DataConfig(crop_size=(4, 6, 8), stride=(2, 3, 5), min_voxels=3)
Dump = dict[str, list[tuple[Any, ...]]]


def dump(db: Path) -> Dump:
    """All rows of all tables, by primary key."""
    keys = {
        "meta": "key",
        "volumes": "id",
        "attributes": "volume_id, name",
        "instances": "volume_id, block",
        "crop_columns": "name, volume_id, block",
        "crop_instances": "volume_id, block",
    }
    connection = sqlite3.connect(db)
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert tables - {"sqlite_stat1", "sqlite_stat4"} == set(keys)
    return {
        table: connection.execute(f"SELECT * FROM {table} ORDER BY {key}").fetchall() for table, key in keys.items()
    }


def rows_of(found: Dump) -> Dump:
    """Without what depends on the times of files."""
    return {**found, "volumes": [row[:-1] for row in found["volumes"]]}


def toy(folder: Path, count: int = 3, **columns: list[object]) -> Manifest:
    """Volumes of differing shapes, crowded, with ignore."""
    volumes = {}
    for number in range(count):
        rng = np.random.default_rng(number)
        label = rng.integers(0, 6, (7 + number, 13, 17 + 2 * number)).astype(np.uint16) * 7
        label[rng.random(label.shape) < 0.02] = 65535
        volumes[f"v{number}"] = (image_volume(label.shape, number), label)
    return write_dataset(folder, volumes, columns)


def build(manifest: Manifest | Path, db: Path, config: DataConfig = CONFIG, **options: Any) -> CropIndex:
    return build_index(manifest, db, config, progress=False, **options)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the volumes of every block that is measured."""
    names: list[str] = []
    measure = crop_index_scan._measure

    def counting(row: Any, *arguments: Any) -> Any:
        names.append(row.name)
        return measure(row, *arguments)

    monkeypatch.setattr(crop_index_scan, "_measure", counting)
    monkeypatch.setattr(crop_index_scan, "_BLOCK_VOXELS", 500)
    return names


def test_an_index_that_matches_is_reused(tmp_path: Path, measured: list[str]) -> None:
    db = tmp_path / "i.sqlite"
    build(toy(tmp_path), db)
    before = db.stat().st_mtime_ns, db.stat().st_ino
    assert set(measured) == {"v0", "v1", "v2"}
    assert len(measured) > 10
    measured.clear()
    build(read_manifest(tmp_path / "manifest.csv"), db)
    build(tmp_path, db)
    assert (db.stat().st_mtime_ns, db.stat().st_ino) == before
    assert measured == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i.sqlite", "manifest.csv", "v0", "v1", "v2"]


def test_a_copy_with_other_times_is_scanned_again(tmp_path: Path, measured: list[str]) -> None:
    db = tmp_path / "i.sqlite"
    build(toy(tmp_path), db)
    before = rows_of(dump(db))
    measured.clear()
    toy(tmp_path)  # the same voxels, written again
    build(tmp_path, db)
    assert set(measured) == {"v0", "v1", "v2"}
    assert rows_of(dump(db)) == before
    measured.clear()
    build(tmp_path, db)
    assert measured == []


@pytest.mark.parametrize(
    "options",
    [
        {"crop_size": (4, 6, 9)},
        {"stride": (2, 3, 6)},
        {"min_voxels": 4},
        {"min_object_voxels": 2},
        {"percentiles": (1.0, 99.0)},
    ],
)
def test_another_configuration_rebuilds(
    tmp_path: Path, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    db = tmp_path / "i.sqlite"
    manifest = toy(tmp_path)
    build(manifest, db)
    config = DataConfig(**{"crop_size": (4, 6, 8), "stride": (2, 3, 5), "min_voxels": 3, **options})
    with caplog.at_level(logging.WARNING):
        index = build(manifest, db, config)
    assert f"changed since it was built: {next(iter(options))}" in caplog.text
    assert index.config == config
    build(manifest, tmp_path / "fresh.sqlite", config)
    assert dump(db) == dump(tmp_path / "fresh.sqlite")


def test_only_what_is_new_is_scanned(tmp_path: Path, measured: list[str], caplog: pytest.LogCaptureFixture) -> None:
    db = tmp_path / "i.sqlite"
    toy(tmp_path, 4)
    stains = ["v0,v0/image.tif,v0/labels.tif,H2B", "v1,v1/image.tif,v1/labels.tif,DAPI"]
    (tmp_path / "manifest.csv").write_text("\n".join(["name,image,label,stain", *stains]))
    build(tmp_path, db)
    more = ["name,image,label,stain,note", *(f"v{n},v{n}/image.tif,v{n}/labels.tif,H2B,x" for n in (3, 1, 2, 0))]

    def check(rows: list[str], scanned: set[str], message: str, **options: Any) -> CropIndex:
        (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n")
        measured.clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            index = build(tmp_path, db, **options)
        assert set(measured) == scanned
        assert message in caplog.text
        build(tmp_path, tmp_path / "fresh.sqlite", **options)
        assert rows_of(dump(db)) == rows_of(dump(tmp_path / "fresh.sqlite"))
        (tmp_path / "fresh.sqlite").unlink()
        return index

    check(more, {"v2", "v3"}, "volumes added: v3, v2")
    check(more[:1] + more[:0:-1], set(), "changed since it was built: manifest")  # another order
    index = check(more[:3], set(), "volumes removed: v0, v2")
    assert [volume.name for volume in index.volumes()] == ["v3", "v1"]
    assert index.crop_ids(where="note == 'x'").shape[0] == len(index)
    check([row.replace("H2B", "GFP") for row in more[:3]], set(), "manifest")
    (tmp_path / "classes.csv").write_text("id,class\n" + "\n".join(f"{7 * n},{n % 3}" for n in range(1, 6)))
    classed = ["name,image,label,classes", *(f"v{n},v{n}/image.tif,v{n}/labels.tif,classes.csv" for n in (3, 1))]
    assert check(classed, set(), "manifest").instances(2).classes.tolist() == [1, 2, 0, 1, 2]
    where = DataConfig(crop_size=(4, 6, 8), stride=(2, 3, 5), min_voxels=3, where="name == 'v1'")
    assert [v.name for v in check(classed, set(), "where; volumes removed: v3", config=where).volumes()] == ["v1"]

    label = tifffile.imread(tmp_path / "v3" / "labels.tif")
    label[label == 7] = 0
    tifffile.imwrite(tmp_path / "v3" / "labels.tif", label, photometric="minisblack")
    check(classed, {"v3"}, "volumes added: v3")
    label[:, :, 0] = 14
    tifffile.imwrite(tmp_path / "v3" / "labels.tif", label, photometric="minisblack", compression="zlib")  # moves all
    assert check(classed, {"v3"}, "files of v3").instances(1).labels.tolist() == [14, 21, 28, 35]


def test_voxels_that_changed_behind_size_and_time(tmp_path: Path, measured: list[str]) -> None:
    db = tmp_path / "i.sqlite"
    build(toy(tmp_path), db)
    path = tmp_path / "v1" / "labels.tif"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    label = tifffile.imread(path)
    label[label == 7] = 14
    tifffile.imwrite(path, label, photometric="minisblack")
    os.utime(path, ns=times)
    measured.clear()
    index = build(tmp_path, db)
    assert set(measured) == {"v1"}
    assert index.instances(2).labels.tolist() == [14, 21, 28, 35]


def write_zarr(folder: Path, label: np.ndarray) -> Manifest:
    for name, array in (("image", image_volume(label.shape)), ("labels", label)):
        stored = zarr.create_array(
            folder / "v" / f"{name}.zarr", shape=array.shape, chunks=(2, 3, 5), dtype=array.dtype
        )
        stored[:] = array
    return read_manifest(folder)


def test_a_rewritten_zarr_chunk_is_scanned_again(tmp_path: Path) -> None:
    manifest = write_zarr(tmp_path, label_volume((4, 6, 10), {3: (0, 0, 0, 2, 2, 2)}))
    db = tmp_path / "i.sqlite"
    assert build(manifest, db).instances(1).labels.tolist() == [3]
    inode = db.stat().st_ino
    build(manifest, db)
    assert db.stat().st_ino == inode
    zarr.open_array(tmp_path / "v" / "labels.zarr", mode="r+")[3, 5, 5:] = 8
    assert build(manifest, db).instances(1).labels.tolist() == [3, 8]


def test_a_chunk_that_cannot_be_decoded(tmp_path: Path) -> None:
    label = label_volume((4, 6, 10), {3: (0, 0, 0, 2, 2, 2), 4: (1, 1, 3, 4, 5, 8)})
    manifest = write_zarr(tmp_path, label)
    chunk = tmp_path / "v" / "labels.zarr" / "c" / "1" / "0" / "1"
    good = chunk.read_bytes()
    chunk.write_bytes(b"no chunk")
    db = tmp_path / "i.sqlite"
    with pytest.raises(ValueError, match=r"^v: .*labels\.zarr.*chunk \(1, 0, 1\) is damaged.*`--skip_bad`"):
        build(manifest, db)
    assert not db.exists()
    index = build(manifest, db, skip_bad=True)
    (record,) = index.volumes()
    assert record.unreadable == ((2, 0, 5, 4, 3, 10),)
    expected = label.copy()
    expected[2:4, 0:3, 5:10] = 65535
    assert index.open_label(record).read((0, 0, 0, 4, 6, 10))[0].tolist() == expected.tolist()
    assert index.open_label(record).read((1, 1, 2, 3, 5, 9))[0].tolist() == expected[1:3, 1:5, 2:9].tolist()
    assert index.instances(1).voxels.tolist() == [8, int((expected == 4).sum())]
    assert index.crop(len(index)).ignore_fraction == pytest.approx(30 / (4 * 6 * 8))
    inode = db.stat().st_ino
    assert build(manifest, db, skip_bad=True).path == db
    assert db.stat().st_ino == inode
    with pytest.raises(ValueError, match="is damaged"):
        build(manifest, db)
    chunk.write_bytes(good)
    index = build(manifest, db)
    assert index.volumes()[0].unreadable == ()
    assert index.instances(1).voxels.tolist() == [8, int((label == 4).sum())]


def test_files_that_are_no_index(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    db = tmp_path / "i.sqlite"
    manifest = toy(tmp_path / "data")
    with pytest.raises(FileNotFoundError, match="seg3d index"):
        CropIndex(db)
    db.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not a crop index"):
        CropIndex(db)
    with pytest.raises(ValueError, match="is not a crop index"):
        build(manifest, db)
    assert db.read_bytes() == b"something else"
    db.unlink()
    connection = sqlite3.connect(db)
    connection.execute("CREATE TABLE notes (text)")
    connection.close()
    with pytest.raises(ValueError, match="is not a crop index"):
        build(manifest, db)
    db.unlink()
    build(manifest, db)
    connection = sqlite3.connect(db)
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()
    with pytest.raises(ValueError, match="has index format 1, this version reads 2; build it again with `seg3d index"):
        CropIndex(db)
    with caplog.at_level(logging.WARNING):
        assert len(build(manifest, db)) > 0
    assert "index format 1" in caplog.text


EVENTS: list[tuple[Any, str]] = [
    *((crop_index_journal.ScanJournal, name) for name in ("scan_id", "add_part", "add_packed", "finish", "commit")),
    (crop_index_build, "_write_volume"),
    (os, "fsync"),
    (Path, "replace"),
    (Path, "unlink"),
]


def run_and_kill(action: Callable[[], object], kill_before: int) -> int:
    """Run in a forked child, which kills itself before an event; the number of events that came, or -1 when killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def wrap(function: Any) -> Any:
            def wrapped(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == kill_before:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return wrapped

        try:
            for owner, name in EVENTS:
                setattr(owner, name, wrap(getattr(owner, name)))
            action()
            os.write(writer, str(count).encode())
        finally:
            os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    return -1 if os.WIFSIGNALED(status) else int(text)


def test_a_build_goes_on_after_a_kill_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crop_index_scan, "_BLOCK_VOXELS", 900)
    monkeypatch.setattr(crop_index_journal, "_COMMIT_SECONDS", 0.0)
    manifest = toy(tmp_path / "data")
    reference = tmp_path / "reference.sqlite"
    num_events = run_and_kill(lambda: build(manifest, reference), 0)
    expected = dump(reference)
    assert num_events > 30
    for event in range(1, num_events + 1):
        db = tmp_path / f"at{event}" / "i.sqlite"
        assert run_and_kill(lambda db=db: build(manifest, db), event) == -1
        assert not db.exists() or dump(db) == expected  # all of it or nothing
        again = run_and_kill(lambda db=db: build(manifest, db), 0)
        assert 0 <= again <= num_events
        assert dump(db) == expected, event
        assert [path.name for path in db.parent.iterdir()] == ["i.sqlite"], event


def test_a_build_that_is_killed_again_and_again_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crop_index_scan, "_BLOCK_VOXELS", 900)
    monkeypatch.setattr(crop_index_journal, "_COMMIT_SECONDS", 0.0)
    manifest = toy(tmp_path / "data")
    build(manifest, tmp_path / "reference.sqlite")
    db = tmp_path / "i.sqlite"
    num_kills = 0
    while run_and_kill(lambda: build(manifest, db), 18) == -1:
        num_kills += 1
        assert num_kills < 30
    assert num_kills >= 2
    assert dump(db) == dump(tmp_path / "reference.sqlite")


def test_blocks_that_are_safe_are_not_measured_again(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crop_index_journal, "_COMMIT_SECONDS", 0.0)
    manifest = toy(tmp_path)
    build(manifest, tmp_path / "reference.sqlite")
    num_blocks = len(measured)
    measured.clear()
    add_part = crop_index_journal.ScanJournal.add_part

    def stop(*arguments: Any) -> None:
        if len(measured) > num_blocks // 2:
            raise KeyboardInterrupt
        add_part(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(crop_index_journal.ScanJournal, "add_part", stop)
        with pytest.raises(KeyboardInterrupt):
            build(manifest, tmp_path / "i.sqlite")
    assert (tmp_path / "i.sqlite.building").exists()
    build(manifest, tmp_path / "i.sqlite")
    assert len(measured) == num_blocks + 1  # the one that was interrupted is measured twice
    assert dump(tmp_path / "i.sqlite") == dump(tmp_path / "reference.sqlite")


def test_an_interrupted_rebuild_keeps_the_old_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = toy(tmp_path / "data")
    db = tmp_path / "out" / "i.sqlite"
    build(manifest, db)
    before = db.read_bytes()

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(crop_index_scan, "measure_intensity", stop)
    with pytest.raises(KeyboardInterrupt):
        build(manifest, db, DataConfig(crop_size=(3, 4, 5)))
    assert db.read_bytes() == before
    assert len(CropIndex(db)) > 0


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = toy(tmp_path / "data")
    build(manifest, tmp_path / "reference.sqlite")
    db = tmp_path / "out" / "i.sqlite"
    with monkeypatch.context() as patch:
        init = crop_index_journal.ScanJournal.__init__

        def small(journal: Any, path: Path) -> None:
            init(journal, path)
            pages = journal._connection.execute("PRAGMA page_count").fetchone()[0]
            journal._connection.execute(f"PRAGMA max_page_count = {pages + 1}")

        patch.setattr(crop_index_journal.ScanJournal, "__init__", small)
        with pytest.raises(OSError, match="make room and run it again") as caught:
            build(manifest, db)
        assert caught.value.errno == errno.ENOSPC
    with monkeypatch.context() as patch:
        patch.setattr(crop_index_build, "SCHEMA", crop_index_build.SCHEMA + "; PRAGMA max_page_count = 1")
        with pytest.raises(OSError, match="make room and run it again"):
            build(manifest, db)
    assert [path.name for path in db.parent.iterdir()] == ["i.sqlite.building"]
    build(manifest, db)
    assert dump(db) == dump(tmp_path / "reference.sqlite")
    assert [path.name for path in db.parent.iterdir()] == ["i.sqlite"]


def during_the_scan(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Do something when the first block was measured."""
    measure = crop_index_scan._measure
    is_done = False

    def acting(*arguments: Any) -> Any:
        nonlocal is_done
        result = measure(*arguments)
        if not is_done:
            is_done = True
            action()
        return result

    monkeypatch.setattr(crop_index_scan, "_measure", acting)


def test_a_manifest_that_is_edited_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy(tmp_path, quality_image=[1, 2, 3])
    path = tmp_path / "manifest.csv"
    db = tmp_path / "i.sqlite"
    during_the_scan(monkeypatch, lambda: path.write_text(path.read_text().replace(",3", ",4")))
    with pytest.raises(ValueError, match=r"manifest\.csv: was edited while its volumes were indexed"):
        build(path, db)
    assert not db.exists()
    assert build(path, db).crop_ids(where="quality_image == 4").shape[0] > 0
    with monkeypatch.context() as patch:
        during_the_scan(patch, path.unlink)
        with pytest.raises(ValueError, match="was edited"):
            build(path, db, DataConfig(crop_size=(3, 3, 3)))


def test_labels_that_change_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = toy(tmp_path)
    path = tmp_path / "v0" / "labels.tif"
    label = tifffile.imread(path)
    label[label == 7] = 0
    with monkeypatch.context() as patch:
        during_the_scan(patch, lambda: tifffile.imwrite(path, label, photometric="minisblack"))
        with pytest.raises(ValueError, match=r"v0: label .*labels\.tif changed while it was indexed"):
            build(manifest, tmp_path / "i.sqlite")
    assert build(manifest, tmp_path / "i.sqlite").instances(1).labels.tolist() == [14, 21, 28, 35]


def test_one_writer(tmp_path: Path) -> None:
    manifest = toy(tmp_path)
    locked, journal = "another process is building this index", tmp_path / "i.sqlite.building"
    with crop_index_journal.ScanJournal(journal), pytest.raises(ValueError, match=locked):
        build(manifest, tmp_path / "i.sqlite")
    build(manifest, tmp_path / "i.sqlite")


def test_an_image_under_two_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    label = label_volume((5, 6, 7), {1: (0, 0, 0, 2, 2, 2)})
    image = image_volume(label.shape)
    black = np.zeros_like(image)
    volumes = {"a": (image, label), "b": (image, label * 2), "c": (black, label), "d": (black, label)}
    manifest = write_dataset(tmp_path, volumes, {"split": ["train", "val", "train", "val"]})
    with pytest.raises(ValueError, match=r"'a' and 'b' are the same image, .* in the splits train and val; remove one"):
        build(manifest, tmp_path / "i.sqlite")
    manifest = write_dataset(tmp_path, volumes, {"split": ["val", "val", "train", "val"]})
    with caplog.at_level(logging.WARNING):
        build(manifest, tmp_path / "i.sqlite")
    assert "'a' and 'b' are the same image" in caplog.text
    assert "'c' and 'd'" not in caplog.text  # black images are alike and prove nothing


def test_images_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    image = image_volume((3, 4, 5)).astype(np.float32)
    image[1, 2, 3] = np.nan
    manifest = write_dataset(tmp_path, {"v": (image, np.ones((3, 4, 5), np.uint8))})
    with pytest.raises(ValueError, match="z 1, y 2, x 3"):
        build(manifest, tmp_path / "i.sqlite")


def test_arguments_that_make_no_sense(tmp_path: Path) -> None:
    manifest = toy(tmp_path)
    with pytest.raises(ValueError, match="num_workers=0"):
        build(manifest, tmp_path / "i.sqlite", num_workers=0)
    with pytest.raises(ValueError, match="where='name == \"x\"' leaves no volume of 3"):
        build(manifest, tmp_path / "i.sqlite", DataConfig(where='name == "x"'))
    with pytest.raises(ValueError, match="num_instances are names of the index itself"):
        build(toy(tmp_path, num_instances=[1, 2, 3]), tmp_path / "i.sqlite")


@pytest.fixture
def small_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few voxels, and workers for any number of them."""
    monkeypatch.setattr(crop_index_scan, "_WORKER_VOXELS", 1)
    monkeypatch.setattr(crop_index_scan, "_BLOCK_VOXELS", 500)


def test_planes_beside_the_index(tmp_path: Path) -> None:
    """The files of a pattern lie where the index is written: only they count as the volume."""
    label = label_volume((5, 6, 7), {3: (0, 0, 0, 2, 2, 2), 9: (3, 2, 1, 5, 6, 7)})
    for name, volume in (("image", image_volume(label.shape)), ("label", label)):
        for z, plane in enumerate(volume):
            tifffile.imwrite(tmp_path / f"{name}_z{z}.tif", plane, photometric="minisblack")
    (tmp_path / "manifest.csv").write_text("name,image,label\nv,image_z*.tif,label_z*.tif\n")
    db = tmp_path / "i.sqlite"
    index = build(tmp_path, db)
    assert index.instances(1).labels.tolist() == [3, 9]
    assert index.open_label(index.volume(1)).read((0, 0, 0, 5, 6, 7))[0].tolist() == label.tolist()
    before = db.stat().st_ino
    (tmp_path / "notes.tif").write_bytes(b"something")
    build(tmp_path, db)
    assert db.stat().st_ino == before
    tifffile.imwrite(tmp_path / "label_z4.tif", label[4] * 2, photometric="minisblack")
    assert build(tmp_path, db).instances(1).labels.tolist() == [3, 9, 18]


@pytest.mark.usefixtures("small_work")
def test_two_processes_write_the_same_rows(tmp_path: Path) -> None:
    manifest = toy(tmp_path, 4)
    build(manifest, tmp_path / "one.sqlite")
    build(manifest, tmp_path / "two.sqlite", num_workers=2)
    assert dump(tmp_path / "one.sqlite") == dump(tmp_path / "two.sqlite")
    label = tifffile.imread(tmp_path / "v3" / "labels.tif").astype(np.int16)
    label[-1, -1, -1] = -3
    tifffile.imwrite(tmp_path / "v3" / "labels.tif", label, photometric="minisblack")
    with pytest.raises(ValueError, match="v3: labels hold -3"):
        build(manifest, tmp_path / "two.sqlite", num_workers=2)


SCRIPT = """
import os, sys, time
from seg3d_monai.data import DataConfig, build_index, crop_index_scan
crop_index_scan._WORKER_VOXELS, crop_index_scan._BLOCK_VOXELS = 1, 500
finish = crop_index_scan._finish
def slow(*arguments):
    children = [int(n) for n in open(f"/proc/self/task/{os.getpid()}/children").read().split()]
    children += [int(n) for c in children for n in open(f"/proc/{c}/task/{c}/children").read().split()]
    print(*children, flush=True)
    time.sleep(60)
crop_index_scan._finish = slow
if __name__ == "__main__":
    build_index(sys.argv[1], sys.argv[2], DataConfig(crop_size=(4, 6, 8)), num_workers=2, progress=False)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at children in /proc")
def test_workers_end_with_the_process_that_is_killed(tmp_path: Path) -> None:
    toy(tmp_path / "data")
    (tmp_path / "script.py").write_text(SCRIPT)
    words = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "data"), str(tmp_path / "i.sqlite")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        children = [int(word) for word in running.stdout.readline().split()]
        assert len(children) >= 2
        running.kill()
        running.wait()
        deadline = time.monotonic() + 20
        while any(is_alive(child) for child in children) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(is_alive(child) for child in children)
    build(tmp_path / "data", tmp_path / "i.sqlite", DataConfig(crop_size=(4, 6, 8)))


@pytest.mark.long
def test_workers_of_ray_read_the_index(tmp_path: Path) -> None:
    import ray

    index = build(toy(tmp_path), tmp_path / "i.sqlite")
    expected = [index.instances(n).voxels.tolist() for n in (1, 2, 3)]
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=2**27, log_to_driver=False)
    try:
        read = ray.remote(lambda index, volume: index.instances(volume).voxels.tolist())
        assert ray.get([read.remote(index, volume) for volume in (1, 2, 3)]) == expected
    finally:
        ray.shutdown()
