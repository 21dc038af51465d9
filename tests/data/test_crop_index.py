"""The crop index: hand-counted toys, every crop against a plain loop, reuse and staleness, builds that fail."""

import logging
import multiprocessing
import pickle
import sqlite3
import threading
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from crop_toys import boxes_by_loop, image_volume, label_volume, write_dataset

from seg3d_monai.data import (
    ArrayVolume,
    CropIndex,
    Manifest,
    build_index,
    crop_index_build,
    index_for,
    read_manifest,
    split_by_specimen,
)
from seg3d_monai.data.label_scan import LabelScan, crop_starts


def toy(folder: Path, **columns: list[object]) -> Manifest:
    """Two volumes: "a" with ids 2, 5, 9 and an ignored corner, "b" smaller than the crop and empty."""
    label = label_volume((6, 8, 12), {2: (0, 0, 0, 2, 2, 2), 5: (1, 3, 5, 5, 6, 7), 9: (5, 7, 8, 6, 8, 12)})
    label[0, 0, 11] = 65535
    return write_dataset(
        folder,
        {
            "a": (image_volume(label.shape), label),
            "b": (image_volume((3, 9, 5)), np.zeros((3, 9, 5), np.uint16)),
        },
        columns,
    )


def build(manifest: Manifest, db: Path, **options: object) -> CropIndex:
    arguments: dict[str, object] = {"crop_size": (4, 8, 6), "stride": (2, 4, 6), "min_voxels": 3, "progress": False}
    return build_index(manifest, db, **{**arguments, **options})  # type: ignore[arg-type]


def test_the_grid_of_a_toy(tmp_path: Path) -> None:
    index = build(toy(tmp_path), tmp_path / "i.sqlite")
    a, b = index.volumes()
    # z: starts 0, 2; y: 0; x: 0, 6 -> four crops; the second volume is smaller along z and x, and has y starts 0, 1.
    assert [index.crop(n).roi for n in range(1, 5)] == [
        (0, 0, 0, 4, 8, 6),
        (0, 0, 6, 4, 8, 12),
        (2, 0, 0, 6, 8, 6),
        (2, 0, 6, 6, 8, 12),
    ]
    assert [index.crop(n).roi for n in (5, 6)] == [(0, 0, 0, 3, 8, 5), (0, 1, 0, 3, 9, 5)]
    assert (a.first_crop, a.num_crops, a.num_instances) == (1, 4, 3)
    assert (b.first_crop, b.num_crops, b.num_instances) == (5, 2, 0)
    assert len(index) == 6
    assert (index.crop_size, index.stride, index.min_voxels, index.num_classes) == ((4, 8, 6), (2, 4, 6), 3, 1)


def test_the_instances_of_a_toy(tmp_path: Path) -> None:
    index = build(toy(tmp_path), tmp_path / "i.sqlite")
    table = index.instances(1)
    assert table.ids.tolist() == [1, 2, 3]
    assert table.labels.tolist() == [2, 5, 9]
    assert table.boxes.tolist() == [[0, 0, 0, 2, 2, 2], [1, 3, 5, 5, 6, 7], [5, 7, 8, 6, 8, 12]]
    assert table.voxels.tolist() == [8, 24, 4]
    assert index.instances(1, ids=[3, 1]).labels.tolist() == [2, 9]
    assert index.instances(1, labels=[5, 77]).ids.tolist() == [2]
    assert len(index.instances(1, ids=[])) == 0
    assert len(index.instances(2)) == 0


def test_the_crop_instances_of_a_toy(tmp_path: Path) -> None:
    index = build(toy(tmp_path), tmp_path / "i.sqlite")
    first = index.crop_instances(1)
    assert first.ids.tolist() == [1, 2]
    assert first.boxes.tolist() == [[0, 0, 0, 2, 2, 2], [1, 3, 5, 4, 6, 6]]
    assert first.voxels.tolist() == [8, 9]
    assert first.truncated.tolist() == [False, True]
    last = index.crop_instances(4)
    assert last.labels.tolist() == [5, 9]
    assert last.boxes.tolist() == [[0, 3, 0, 3, 6, 1], [3, 7, 2, 4, 8, 6]]
    assert last.truncated.tolist() == [True, False]
    assert [index.crop(n).num_instances for n in range(1, 7)] == [2, 1, 1, 2, 0, 0]
    assert index.crop(1).foreground_fraction == pytest.approx(17 / 192)
    assert [index.crop(n).ignore_fraction for n in (1, 2)] == [0, pytest.approx(1 / 192)]
    assert len(index.crop_instances(5)) == 0


def test_fragments_do_not_count(tmp_path: Path) -> None:
    index = build(toy(tmp_path), tmp_path / "i.sqlite", min_voxels=10)
    # In the first crop 9 of 24 voxels are visible; id 9 has only 4 voxels but is whole in the last.
    assert [index.crop(n).num_instances for n in range(1, 5)] == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("crop", "stride"), [((5, 7, 9), (2, 3, 4)), ((4, 4, 4), (4, 4, 4)), ((50, 6, 50), (25, 5, 1))]
)
@pytest.mark.parametrize("max_voxels", [1, 300, 10**6])
def test_a_scan_agrees_with_a_loop_over_crops(crop: tuple[int, ...], stride: tuple[int, ...], max_voxels: int) -> None:
    rng = np.random.default_rng(3)
    label = np.kron(rng.integers(0, 40, (4, 5, 7)), np.ones((3, 3, 3), int))[:11, :13, :20].astype(np.uint16) * 3
    label[rng.random(label.shape) < 0.05] = 65535
    scan = LabelScan(label=ArrayVolume(label), crop_size=crop, stride=stride, max_voxels=max_voxels)
    crops = list(scan)
    corners = list(product(*(crop_starts(n, c, s) for n, c, s in zip(label.shape, crop, stride, strict=True))))
    assert [found.box[:3] for found in crops] == corners
    for found in crops:
        z1, y1, x1, z2, y2, x2 = found.box
        part = label[z1:z2, y1:y2, x1:x2].astype(np.int64)
        part[part == 65535] = -1
        expected = boxes_by_loop(part)
        assert found.rows[:, 0].tolist() == list(expected)
        assert (found.rows[:, 2:] - [z1, y1, x1, z1, y1, x1]).tolist() == list(expected.values())
        assert found.rows[:, 1].tolist() == [int((part == number).sum()) for number in expected]
        assert (found.foreground, found.ignored) == (int((part > 0).sum()), int((part == -1).sum()))
    everything = label.astype(np.int64)
    everything[everything == 65535] = -1
    assert scan.instances[:, 2:].tolist() == list(boxes_by_loop(everything).values())


def test_a_scan_reads_every_voxel_once() -> None:
    label = image_volume((9, 14, 22))

    class Counting(ArrayVolume):
        seen = np.zeros(label.shape, int)

        def read(self, roi):  # type: ignore[no-untyped-def]
            z1, y1, x1, z2, y2, x2 = roi
            self.seen[z1:z2, y1:y2, x1:x2] += 1
            return super().read(roi)

    list(LabelScan(label=Counting(label), crop_size=(4, 6, 8), stride=(2, 3, 5), max_voxels=500))
    assert (Counting.seen == 1).all()


def test_long_cells_are_cut_and_joined() -> None:
    label = label_volume((2, 3, 600), {4: (0, 1, 10, 2, 2, 590)})
    scan = LabelScan(label=ArrayVolume(label), crop_size=(2, 3, 600), stride=(1, 1, 300))
    (crop,) = scan
    assert crop.rows.tolist() == [[4, 1160, 0, 1, 10, 2, 2, 590]]
    assert scan.instances.tolist() == crop.rows.tolist()


def test_crop_starts_by_hand() -> None:
    assert crop_starts(10, 4, 3) == [0, 3, 6]
    assert crop_starts(11, 4, 3) == [0, 3, 6, 7]
    assert crop_starts(4, 4, 2) == [0]
    assert crop_starts(3, 4, 2) == [0]


def test_crops_and_volumes_are_filtered(tmp_path: Path) -> None:
    manifest = toy(tmp_path, specimen=["s1", "s2"], split=["train", "val"], quality_image=[3, 1], stain=["H2B", "DAPI"])
    index = build(manifest, tmp_path / "i.sqlite")
    assert index.crop_ids(where="num_instances >= 2").tolist() == [[1, 1, 2], [4, 1, 2]]
    assert index.crop_ids(where='quality_image >= 2 and stain == "H2B" and ignore_fraction > 0')[:, 0].tolist() == [2]
    assert index.crop_ids(split="val")[:, 0].tolist() == [5, 6]
    assert [v.name for v in index.volumes(where="quality_image < 2")] == ["b"]
    assert [v.name for v in index.volumes(split="train")] == ["a"]
    assert index.crop_ids(where='specimen == "s1"', split="val").shape == (0, 3)
    assert index.volumes()[0].attributes == {"quality_image": 3, "stain": "H2B"}
    assert index.volume(2).split == "val"
    with pytest.raises(ValueError, match="the nearest is 'quality_image'"):
        index.crop_ids(where="qualty_image > 1")
    with pytest.raises(ValueError, match="split='valid' is unknown; use one of train, val, test"):
        index.volumes(split="valid")
    with pytest.raises(ValueError, match="crop_id=99"):
        index.crop(99)
    with pytest.raises(ValueError, match="volume_id=9"):
        index.volume(9)


def test_classes_come_from_a_table(tmp_path: Path) -> None:
    (tmp_path / "classes.csv").write_text("id,class\n2,0\n5,2\n9,1\n")
    (tmp_path / "short.csv").write_text("id,class\n2,0\n5,2\n")
    (tmp_path / "none.csv").write_text("id,class\n1,0\n")
    index = build(toy(tmp_path, classes=["classes.csv", "none.csv"]), tmp_path / "i.sqlite")
    assert index.instances(1).classes.tolist() == [0, 2, 1]
    assert index.crop_instances(4).classes.tolist() == [2, 1]
    assert index.num_classes == 3
    with pytest.raises(ValueError, match=r"a: label ids \[9\] have no class"):
        build(toy(tmp_path, classes=["short.csv", "none.csv"]), tmp_path / "j.sqlite")
    assert not (tmp_path / "j.sqlite").exists()


def test_three_hundred_instances_and_one(tmp_path: Path) -> None:
    many = np.kron(np.arange(1, 301).reshape(5, 6, 10), np.ones((2, 2, 3), int)).astype(np.uint32)
    one = np.full((4, 5, 6), 1, np.uint32)
    manifest = write_dataset(
        tmp_path, {"many": (image_volume(many.shape), many), "one": (image_volume(one.shape), one)}
    )
    index = build_index(manifest, tmp_path / "i.sqlite", crop_size=(4, 8, 12), min_voxels=0, progress=False)
    assert index.instances(1).ids.tolist() == list(range(1, 301))
    assert set(index.instances(1).voxels.tolist()) == {12}
    assert index.instances(2).boxes.tolist() == [[0, 0, 0, 4, 5, 6]]
    assert index.stride == (2, 4, 6)


def test_an_index_that_matches_is_reused(tmp_path: Path) -> None:
    db = tmp_path / "i.sqlite"
    build(toy(tmp_path), db)
    before = db.stat().st_mtime_ns, db.stat().st_ino
    build(read_manifest(tmp_path / "manifest.csv"), db)
    assert (db.stat().st_mtime_ns, db.stat().st_ino) == before


def test_a_copy_with_other_times_is_reused(tmp_path: Path) -> None:
    db = tmp_path / "i.sqlite"
    build(toy(tmp_path), db)
    before = db.stat().st_ino
    build(toy(tmp_path), db)  # the same voxels, written again
    assert db.stat().st_ino == before


@pytest.mark.parametrize(
    "options",
    [{"crop_size": (4, 8, 7)}, {"stride": (2, 4, 5)}, {"min_voxels": 4}, {"percentiles": (1.0, 99.0)}],
)
def test_other_options_rebuild(tmp_path: Path, options: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    db = tmp_path / "i.sqlite"
    manifest = toy(tmp_path)
    build(manifest, db)
    with caplog.at_level(logging.WARNING):
        index = build(manifest, db, **options)
    (key,) = options
    assert f"changed since it was built: {key}" in caplog.text
    found = index.config[key]
    assert tuple(found) == options[key] if isinstance(found, list) else found == options[key]


def test_another_manifest_rebuilds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    db = tmp_path / "i.sqlite"
    build(toy(tmp_path, quality_image=[1, 2]), db)
    with caplog.at_level(logging.WARNING):
        index = build(toy(tmp_path, quality_image=[1, 3]), db)
    assert "changed since it was built: manifest" in caplog.text
    assert index.crop_ids(where="quality_image == 3")[:, 1].tolist() == [2, 2]


def test_other_voxels_rebuild(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    db = tmp_path / "i.sqlite"
    manifest = toy(tmp_path)
    build(manifest, db)
    label = tifffile.imread(tmp_path / "a" / "labels.tif")
    label[label == 9] = 0
    tifffile.imwrite(tmp_path / "a" / "labels.tif", label, photometric="minisblack")
    with caplog.at_level(logging.WARNING):
        index = build(manifest, db)
    assert "images or labels" in caplog.text
    assert index.instances(1).labels.tolist() == [2, 5]


def test_a_rewritten_zarr_chunk_rebuilds(tmp_path: Path) -> None:
    label = label_volume((4, 6, 10), {3: (0, 0, 0, 2, 2, 2)})
    for name, array in (("image", image_volume(label.shape)), ("labels", label)):
        path = tmp_path / "v" / f"{name}.zarr"
        stored = zarr.create_array(path, shape=array.shape, chunks=(2, 3, 5), dtype=array.dtype)
        stored[:] = array
    manifest = read_manifest(tmp_path)
    db = tmp_path / "i.sqlite"
    assert build(manifest, db).instances(1).labels.tolist() == [3]
    inode = db.stat().st_ino
    build(manifest, db)
    assert db.stat().st_ino == inode
    zarr.open_array(tmp_path / "v" / "labels.zarr", mode="r+")[3, 5, 5:] = 8
    assert build(manifest, db).instances(1).labels.tolist() == [3, 8]


def test_a_file_that_is_no_index(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    db = tmp_path / "i.sqlite"
    with pytest.raises(FileNotFoundError, match="seg3d index"):
        CropIndex(db)
    db.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not a crop index"):
        CropIndex(db)
    with caplog.at_level(logging.WARNING):
        build(toy(tmp_path), db)
    assert "rebuilding" in caplog.text
    connection = sqlite3.connect(db)
    connection.execute("PRAGMA user_version = 99")
    connection.commit()
    connection.close()
    with pytest.raises(ValueError, match="index format 99, this version reads 1"):
        CropIndex(db)


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = toy(tmp_path / "data")
    (tmp_path / "out").mkdir()

    class Stopped:
        def __init__(self, **_: object) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(crop_index_build, "LabelScan", Stopped)
    with pytest.raises(KeyboardInterrupt):
        build(manifest, tmp_path / "out" / "i.sqlite")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupted_rebuild_keeps_the_old_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = toy(tmp_path / "data")
    db = tmp_path / "out" / "i.sqlite"
    build(manifest, db)
    before = db.read_bytes()

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(crop_index_build, "measure_intensity", stop)
    with pytest.raises(KeyboardInterrupt):
        build(manifest, db, min_voxels=7)
    assert [path.name for path in db.parent.iterdir()] == ["i.sqlite"]
    assert db.read_bytes() == before


def test_the_file_keeps_a_rollback_journal_and_is_only_read(tmp_path: Path) -> None:
    db = tmp_path / "out" / "i.sqlite"
    index = build(toy(tmp_path), db)
    assert db.read_bytes()[18:20] == b"\x01\x01"  # the header's write and read versions: 1 is a journal, 2 is WAL
    db.chmod(0o444)
    db.parent.chmod(0o555)
    try:
        assert len(CropIndex(db)) == len(index) == 6
    finally:
        db.parent.chmod(0o755)
    assert [path.name for path in db.parent.iterdir()] == ["i.sqlite"]


def test_the_index_pickles_forks_and_serves_threads(tmp_path: Path) -> None:
    index = build(toy(tmp_path), tmp_path / "i.sqlite")
    expected = index.instances(1).voxels.tolist()
    assert pickle.loads(pickle.dumps(index)).instances(1).voxels.tolist() == expected
    found: list[list[int]] = []
    thread = threading.Thread(target=lambda: found.append(index.instances(1).voxels.tolist()))
    thread.start()
    thread.join()
    assert found == [expected]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_voxels, [index] * 4) == [expected] * 4
    assert index.instances(1).voxels.tolist() == expected


def _voxels(index: CropIndex) -> list[int]:
    return [int(n) for n in index.instances(1).voxels]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.full((3, 4, 5), -1, np.int16), "labels hold -1"),
        (np.zeros((3, 4, 5), bool), "labels have dtype bool"),
        (np.zeros((3, 4, 5), np.float32), "labels have dtype float32"),
        (np.zeros((2, 3, 4, 5), np.uint8), "labels have 2 channels"),
        (np.full((3, 4, 5), 2**63, np.uint64), "2\\*\\*63"),
    ],
)
def test_labels_that_are_not_ids_are_refused(label: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(LabelScan(label=ArrayVolume(label), crop_size=(2, 3, 4), stride=(1, 2, 2)))


def test_images_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    image = image_volume((3, 4, 5)).astype(np.float32)
    image[1, 2, 3] = np.nan
    manifest = write_dataset(tmp_path, {"v": (image, np.ones((3, 4, 5), np.uint8))})
    with pytest.raises(ValueError, match="z 1, y 2, x 3"):
        build(manifest, tmp_path / "i.sqlite")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_size": (4, 8)}, "crop_size"),
        ({"crop_size": (4, 0, 8)}, "crop_size"),
        ({"stride": (5, 4, 6)}, "larger than crop_size"),
        ({"min_voxels": -1}, "min_voxels=-1"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(toy(tmp_path), tmp_path / "i.sqlite", **options)


def test_a_manifest_column_that_is_taken(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_instances are names of the index itself"):
        build(toy(tmp_path, num_instances=[1, 2]), tmp_path / "i.sqlite")


def test_rows_without_labels_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toy(tmp_path)
    lines = (tmp_path / "manifest.csv").read_text().replace("b/labels.tif", "")
    (tmp_path / "manifest.csv").write_text(lines)
    with caplog.at_level(logging.WARNING):
        index = build(read_manifest(tmp_path), tmp_path / "i.sqlite")
    assert "left out of the index for want of a label volume: b" in caplog.text
    assert [volume.name for volume in index.volumes()] == ["a"]
    (tmp_path / "manifest.csv").write_text(lines.replace("a/labels.tif", ""))
    with pytest.raises(ValueError, match="no row of the manifest has a label volume"):
        build(read_manifest(tmp_path), tmp_path / "i.sqlite")


def test_a_volume_that_changed_shape_is_not_opened(tmp_path: Path) -> None:
    index = build(toy(tmp_path), tmp_path / "i.sqlite")
    record = index.volume(1)
    assert index.open_image(record).shape == (1, 6, 8, 12)
    assert index.open_label(record).shape == (1, 6, 8, 12)
    tifffile.imwrite(record.image, image_volume((6, 8, 11)), photometric="minisblack")
    with pytest.raises(ValueError, match="build the index again"):
        index.open_image(record)


def specimens(folder: Path, count: int = 4) -> Manifest:
    names = [f"Emb{embryo}_t{time}" for embryo in range(count) for time in (0, 1)]
    return write_dataset(folder, {name: (image_volume((3, 4, 5)), np.ones((3, 4, 5), np.uint8)) for name in names})


def test_index_for_splits_by_specimen(tmp_path: Path) -> None:
    specimens(tmp_path)
    index = index_for(
        tmp_path,
        tmp_path / "out" / "i.sqlite",
        crop_size=(3, 4, 5),
        specimen_pattern=r"(Emb\d+)",
        val_specimens=["Emb2"],
        test_specimens=["Emb3"],
        progress=False,
    )
    names = {split: [v.name for v in index.volumes(split=split)] for split in ("train", "val", "test")}
    assert names == {
        "train": ["Emb0_t0", "Emb0_t1", "Emb1_t0", "Emb1_t1"],
        "val": ["Emb2_t0", "Emb2_t1"],
        "test": ["Emb3_t0", "Emb3_t1"],
    }


def test_a_fraction_takes_whole_specimens(tmp_path: Path) -> None:
    specimens(tmp_path)
    rows = read_manifest(tmp_path, specimen_pattern=r"(Emb\d+)").rows
    seen = set()
    for seed in range(8):
        split = split_by_specimen(rows, val_fraction=0.3, seed=seed)
        assert split == split_by_specimen(rows, val_fraction=0.3, seed=seed)
        chosen = {row.specimen for row in split if row.split == "val"}
        assert len(chosen) == 2  # 0.3 of eight volumes is more than one specimen of two
        assert sum(row.split == "val" for row in split) == 4
        seen.add(frozenset(chosen))
    assert len(seen) > 1
    most = split_by_specimen(rows, val_fraction=0.99)
    assert {row.split for row in most} == {"train", "val"}


def test_splits_that_make_no_sense(tmp_path: Path) -> None:
    rows = specimens(tmp_path / "x").rows
    names = "Emb0_t0, Emb0_t1, Emb1_t0"
    with pytest.raises(ValueError, match=f"val_specimens names Emb9; the specimens are {names}"):
        split_by_specimen(rows, val_specimens=["Emb9"])
    with pytest.raises(ValueError, match="Emb0_t0 are in val_specimens and test_specimens"):
        split_by_specimen(rows, val_specimens=["Emb0_t0"], test_specimens=["Emb0_t0"])
    named = split_by_specimen(rows, val_specimens=["Emb0_t0"], val_fraction=0.5)
    assert named == split_by_specimen(rows, val_specimens=["Emb0_t0"])
    assert split_by_specimen(named, val_fraction=0.5) == named
    with pytest.raises(ValueError, match="val_fraction=1"):
        split_by_specimen(rows, val_fraction=1.0)
    with pytest.raises(TypeError, match="give a list of specimens"):
        split_by_specimen(rows, val_specimens="Emb0_t0")
    with pytest.raises(ValueError, match="needs two specimens"):
        split_by_specimen(rows[:1], val_fraction=0.5)
    ready = toy(tmp_path / "y", specimen=["s", "t"], split=["train", "val"]).rows
    assert split_by_specimen(ready) == ready
    with pytest.raises(ValueError, match="the manifest has a column 'split'"):
        split_by_specimen(ready, val_specimens=["s"])
    half = toy(tmp_path / "z", specimen=["s", "t"], split=["train", ""]).rows
    with pytest.raises(ValueError, match="rows b have no split"):
        split_by_specimen(half)
