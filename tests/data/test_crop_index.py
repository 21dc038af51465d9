"""The crop index: hand-counted toys, filters, reading from other processes, splits."""

import multiprocessing
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import tifffile
from crop_toys import image_volume, label_volume, write_dataset

from seg3d_monai.data import (
    CropIndex,
    DataConfig,
    Manifest,
    build_index,
    index_for,
    read_manifest,
    split_by_specimen,
)


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
    keys: dict[str, object] = {"crop_size": (4, 8, 6), "stride": (2, 4, 6), "min_voxels": 3}
    return build_index(manifest, db, DataConfig(**{**keys, **options}), progress=False)  # type: ignore[arg-type]


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
    config = DataConfig(crop_size=(4, 8, 12), min_voxels=0)
    index = build_index(manifest, tmp_path / "i.sqlite", config, progress=False)
    assert index.instances(1).ids.tolist() == list(range(1, 301))
    assert set(index.instances(1).voxels.tolist()) == {12}
    assert index.instances(2).boxes.tolist() == [[0, 0, 0, 4, 5, 6]]
    assert index.stride == (2, 4, 6)


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
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.map(_voxels, [index] * 2) == [expected] * 2
    assert index.instances(1).voxels.tolist() == expected


def _voxels(index: CropIndex) -> list[int]:
    return [int(n) for n in index.instances(1).voxels]


def test_small_objects_do_not_count(tmp_path: Path) -> None:
    index = build(toy(tmp_path), tmp_path / "i.sqlite", min_object_voxels=8)
    assert [index.crop(n).num_instances for n in range(1, 7)] == [2, 1, 1, 1, 0, 0]  # id 9 has 4 voxels
    assert index.crop_instances(4).labels.tolist() == [5, 9]
    assert index.min_object_voxels == 8


def test_volumes_without_labels_are_apart(tmp_path: Path) -> None:
    toy(tmp_path)
    lines = (tmp_path / "manifest.csv").read_text().replace("b/labels.tif", "")
    (tmp_path / "manifest.csv").write_text(lines)
    index = build(read_manifest(tmp_path), tmp_path / "i.sqlite")
    assert [volume.name for volume in index.volumes()] == ["a"]
    (bare,) = index.volumes(labelled=False)
    assert (bare.name, bare.label, bare.num_instances, bare.first_crop, bare.num_crops) == ("b", None, 0, 5, 2)
    assert [volume.name for volume in index.volumes(labelled=None)] == ["a", "b"]
    assert index.crop(6).roi == (0, 1, 0, 3, 9, 5)
    assert (index.crop(6).num_instances, index.crop(6).ignore_fraction) == (0, 1)
    assert len(index.crop_instances(6)) == len(index.instances(2)) == 0
    assert index.crop_ids()[:, 0].tolist() == [1, 2, 3, 4]
    assert index.crop_ids(labelled=False)[:, 0].tolist() == [5, 6]
    assert (index.count(), index.count(labelled=False), index.count(labelled=None), len(index)) == (4, 2, 6, 6)
    assert index.open_image(bare).shape == (1, 3, 9, 5)
    assert index.open_ignore(bare) is None
    with pytest.raises(ValueError, match="b: has no label"):
        index.open_label(bare)
    (tmp_path / "manifest.csv").write_text(lines.replace("a/labels.tif", ""))
    with pytest.raises(ValueError, match="no row of the manifest has a label volume"):
        build(read_manifest(tmp_path), tmp_path / "i.sqlite")


def test_a_mask_is_ignored(tmp_path: Path) -> None:
    toy(tmp_path)
    mask = np.zeros((6, 8, 12), np.uint8)
    mask[:, :, 6:] = 1
    tifffile.imwrite(tmp_path / "a" / "mask.tif", mask, photometric="minisblack")
    (tmp_path / "manifest.csv").write_text(
        "name,image,label,ignore\na,a/image.tif,a/labels.tif,a/mask.tif\nb,b/image.tif,b/labels.tif,\n"
    )
    index = build(read_manifest(tmp_path), tmp_path / "i.sqlite")
    assert index.instances(1).labels.tolist() == [2, 5]
    assert index.instances(1).boxes.tolist() == [[0, 0, 0, 2, 2, 2], [1, 3, 5, 5, 6, 6]]
    assert [index.crop(n).ignore_fraction for n in range(1, 5)] == [0, 1, 0, 1]
    record = index.volume(1)
    assert record.ignore == str(tmp_path / "a" / "mask.tif")
    found = index.open_ignore(record)
    assert found is not None
    assert found.read((0, 0, 0, 6, 8, 12))[0].tolist() == mask.tolist()


def test_an_instance_of_every_block_is_found(tmp_path: Path) -> None:
    """More instances than a stored block holds, with ids far apart."""
    label = np.kron(np.arange(1, 1001).reshape(10, 10, 10), np.ones((1, 2, 2), int)).astype(np.uint32) * 3_000_000
    manifest = write_dataset(tmp_path, {"v": (image_volume(label.shape), label)})
    index = build_index(manifest, tmp_path / "i.sqlite", DataConfig(crop_size=(3, 6, 8), min_voxels=0), progress=False)
    assert index.instances(1).labels.tolist() == [n * 3_000_000 for n in range(1, 1001)]
    assert index.instances(1, ids=[1000, 256, 257, 1, 1]).labels.tolist() == [
        3_000_000 * n for n in (1, 256, 257, 1000)
    ]
    assert index.instances(1, labels=[1, 3_000_000, 2_999_999_999, 3_000_000_000]).ids.tolist() == [1, 1000]
    assert index.instances(1, ids=[5, 600], labels=[15_000_000]).ids.tolist() == [5]
    assert index.instances(1, ids=[0, 1001, -4]).ids.tolist() == []
    for crop_id in (1, len(index) // 2, len(index)):
        z1, y1, x1, z2, y2, x2 = index.crop(crop_id).roi
        table = index.crop_instances(crop_id)
        part = label[z1:z2, y1:y2, x1:x2]
        assert table.labels.tolist() == np.unique(part).tolist()
        assert table.voxels.tolist() == [int((part == number).sum()) for number in table.labels]
        assert table.truncated.tolist() == [bool((part == n).sum() < 4) for n in table.labels]
        assert index.crop(crop_id).num_instances == len(table)


def test_selections_agree_with_the_list_of_crops(tmp_path: Path) -> None:
    volumes = {
        name: (
            image_volume(shape, seed),
            np.random.default_rng(seed).integers(0, 3, shape).astype(np.uint8) * (seed % 2),
        )
        for seed, (name, shape) in enumerate({"a": (4, 9, 30), "b": (3, 20, 8), "c": (7, 7, 7), "d": (2, 2, 2)}.items())
    }
    manifest = write_dataset(tmp_path, volumes, {"quality_image": [1, 2, 3, 4]})
    index = build_index(manifest, tmp_path / "i.sqlite", DataConfig(crop_size=(3, 5, 6), min_voxels=1), progress=False)
    for where in (None, "True", "x1 > 3", "num_instances == 2 and quality_image > 1", "quality_image > 9"):
        listed = index.crop_ids(where=where)
        records, selection = index.select(where=where)
        assert len(selection) == index.count(where=where) == len(listed)
        assert (
            [r.id for r in records] == [v.id for v in index.volumes(where=where)] == sorted(set(listed[:, 1].tolist()))
        )
        for position, record in enumerate(records):
            own = listed[listed[:, 1] == record.id]
            assert selection.num_crops[position] == len(own)
            assert [selection.crop(position, n) for n in range(len(own))] == own[:, 0].tolist()
            filled = own[own[:, 2] > 0]
            assert selection.num_occupied[position] == len(filled)
            found = [selection.crop(position, n, occupied=True) for n in range(len(filled))]
            assert found == filled[:, 0].tolist()
            with pytest.raises(IndexError, match="rank"):
                selection.crop(position, len(own))


def test_a_column_of_crops_agrees_with_the_crops(tmp_path: Path) -> None:
    index = build(toy(tmp_path, quality_image=[3, 1]), tmp_path / "i.sqlite")
    for name in ("z1", "y1", "x1", "z2", "y2", "x2"):
        corners = ["z1", "y1", "x1", "z2", "y2", "x2"]
        for number in range(1, len(index) + 1):
            value = index.crop(number).roi[corners.index(name)]
            assert number in index.crop_ids(where=f"{name} == {value}")[:, 0]
            assert number not in index.crop_ids(where=f"{name} != {value}")[:, 0]
    assert index.crop_ids(where="crop_id in (2, 5)")[:, 0].tolist() == [2, 5]
    assert index.crop_ids(where="foreground_fraction > 0.08")[:, 0].tolist() == [1]
    assert index.crop_ids(where="volume_instances == 0 and size_y == 9 and channels == 1")[:, 0].tolist() == [5, 6]
    assert index.crop_ids(where="spacing_z_um == None")[:, 0].tolist() == [1, 2, 3, 4, 5, 6]


def test_a_volume_that_changed_shape_is_not_opened(tmp_path: Path) -> None:
    index = build(toy(tmp_path), tmp_path / "i.sqlite")
    record = index.volume(1)
    assert index.open_image(record).shape == (1, 6, 8, 12)
    assert index.open_label(record).shape == (1, 6, 8, 12)
    tifffile.imwrite(record.image, image_volume((6, 8, 11)), photometric="minisblack")
    with pytest.raises(ValueError, match="build it again"):
        index.open_image(record)


def specimens(folder: Path, count: int = 4) -> Manifest:
    names = [f"Emb{embryo}_t{time}" for embryo in range(count) for time in (0, 1)]
    label = np.ones((3, 4, 5), np.uint8)
    return write_dataset(folder, {name: (image_volume((3, 4, 5), seed), label) for seed, name in enumerate(names)})


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


def test_a_split_by_another_column(tmp_path: Path) -> None:
    manifest = specimens(tmp_path)
    pairs = [line.split(",")[0] for line in (tmp_path / "manifest.csv").read_text().splitlines()[1:]]
    lines = ["name,image,label,plate,specimen"]
    lines += [f"{n},{n}/image.tif,{n}/labels.tif,{k // 4},{n.split('_')[0]}" for k, n in enumerate(pairs)]
    (tmp_path / "manifest.csv").write_text("\n".join(lines))
    rows = read_manifest(tmp_path).rows
    split = split_by_specimen(rows, split_by="plate", val_specimens=["1"])
    assert [row.name for row in split if row.split == "val"] == pairs[4:]
    assert {row.split for row in split_by_specimen(rows, split_by="plate", val_fraction=0.2)} == {"train", "val"}
    with pytest.raises(ValueError, match="the plates are 0, 1"):
        split_by_specimen(rows, split_by="plate", val_specimens=["2"])
    with pytest.raises(ValueError, match="no value in the column split_by='well'; columns are specimen, name, plate"):
        split_by_specimen(rows, split_by="well", val_fraction=0.5)
    assert manifest.rows[0].name == rows[0].name


def test_a_split_that_cuts_a_specimen_names_its_volumes(tmp_path: Path) -> None:
    specimens(tmp_path)
    rows = read_manifest(tmp_path, specimen_pattern=r"(Emb\d+)").rows
    with pytest.raises(ValueError, match=r"'Emb1' is in 2 splits \(train: Emb1_t0; val: Emb1_t1\)"):
        split_by_specimen(rows, split_by="name", val_specimens=["Emb1_t1"])
    with pytest.raises(ValueError, match=r"cuts specimens: specimen 'Emb0'.*; specimen 'Emb2'"):
        split_by_specimen(rows, split_by="name", val_specimens=["Emb0_t0"], test_specimens=["Emb2_t1"])
