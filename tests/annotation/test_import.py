"""From corrected labels to label volumes, a manifest and an index: bit for bit, and never over the user's files."""

import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import tifffile
import zarr
from annotate_toys import SHAPE, SPACING, BrightBoxes, Grey, image_of, index_of, labels_of, write_manifest

from seg3d_monai.annotation import Imported, import_annotations, import_labels, merge, suggest_regions
from seg3d_monai.annotation.task import read_task
from seg3d_monai.data import CropDataset, CropIndex, DataConfig, build_index, read_manifest

IGNORE = 2**32 - 1
SURE = 980
BOXES = [
    (1, 5, 4, 4, 11, 12),
    (1, 5, 20, 4, 11, 28),
    (1, 25, 36, 4, 31, 44),
    (7, 5, 30, 10, 11, 38),
    (7, 25, 52, 10, 31, 60),
]


def slices(roi: tuple[int, ...], origin: tuple[int, ...] = (0, 0, 0)) -> tuple[slice, ...]:
    return tuple(slice(roi[a] - origin[a], roi[a + 3] - origin[a]) for a in range(3))


class Folder:
    """A manifest with a labelled volume and one without, and regions suggested of the latter."""

    def __init__(self, root: Path, volumes: dict[str, dict[str, Any]] | None = None, **options: Any) -> None:
        image = image_of(SHAPE, dict.fromkeys(BOXES, SURE))
        self.volumes = volumes or {
            "known": {"image": image, "label": labels_of(SHAPE, BOXES), "specimen": "a", "split": "train"},
            "bare": {"image": image + 1, "specimen": "b", "split": "", "quality_image": 3},
            "judged": {"image": image + 2, "label": labels_of(SHAPE, BOXES), "specimen": "c", "split": "val"},
        }
        self.root = root
        self.manifest = write_manifest(root / "data", self.volumes)
        self.index = index_of(self.manifest)
        self.folder = root / "out"
        predictor = BrightBoxes(Grey(), classes=self.index.num_classes)
        settings = {"num": 2, "margin": (1, 3, 2), "training": {"bundle": "maskrcnn3d", "checkpoint": "m.pt"}}
        suggest_regions(
            self.index.path,
            self.folder,
            predictor=predictor,
            backbone=predictor.backbone,
            progress=False,
            **settings | options,
        )
        self.regions = read_task(self.folder).regions

    def correct(self, number: int, labels: np.ndarray, name: str = "labels.tif") -> None:
        """Save labels over the exported ones, as napari does."""
        tifffile.imwrite(self.folder / f"{number:03d}" / name, labels, photometric="minisblack")

    def exported(self, number: int) -> np.ndarray:
        return tifffile.imread(self.folder / f"{number:03d}" / "labels.tif")

    def take(self, **options: Any) -> Imported:
        return import_annotations(self.folder, self.manifest, progress=False, **options)

    def labels(self, name: str, done: Imported) -> np.ndarray:
        (row,) = (row for row in read_manifest(done.manifest).rows if row.name == name)
        return row.open_label().read((0, 0, 0, *SHAPE))[0]


@pytest.fixture
def toy(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def files_of(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_round_trip_bit_for_bit(toy: Folder) -> None:
    before = files_of(toy.root / "data")
    rng = np.random.default_rng(0)
    painted = {}
    for region in toy.regions:
        extent = tuple(np.subtract(region.window[3:], region.window[:3]))
        painted[region.number] = np.zeros(extent, np.uint32)
        inside = slices(region.roi, region.window)
        ids = rng.integers(0, 5, tuple(np.subtract(region.roi[3:], region.roi[:3]))) * 1000
        painted[region.number][inside] = ids
        toy.correct(region.number, painted[region.number])
    done = toy.take()
    labels = toy.labels("bare", done)
    assert labels.dtype == np.uint32
    outside = np.ones(SHAPE, bool)
    next_id = 1
    for region in toy.regions:
        ids = painted[region.number][slices(region.roi, region.window)]
        new = {old: next_id + rank for rank, old in enumerate(np.unique(ids[ids > 0]).tolist())} | {0: 0}
        np.testing.assert_array_equal(labels[slices(region.roi)], np.vectorize(new.get)(ids))
        next_id += len(new) - 1
        outside[slices(region.roi)] = False
    assert (labels[outside] == IGNORE).all()
    assert (done.num_objects, done.num_volumes, done.num_kept) == (8, 1, 0)
    assert files_of(toy.root / "data") == before


def test_an_unlabelled_volume_becomes_labelled_and_splits_stay(toy: Folder) -> None:
    done = toy.take(accept_unchanged=True, allow_empty=True)
    rows = {row.name: row for row in read_manifest(done.manifest).rows}
    assert {name: row.split for name, row in rows.items()} == {"known": "train", "bare": "train", "judged": "val"}
    assert {name: row.specimen for name, row in rows.items()} == {"known": "a", "bare": "b", "judged": "c"}
    assert rows["bare"].attributes == {"quality_image": 3.0}
    assert rows["bare"].spacing_um == SPACING
    assert rows["known"].label == toy.root / "data" / "known" / "labels.tif"
    index = CropIndex(done.index)
    assert {volume.name for volume in index.volumes()} == {"known", "bare", "judged"}
    assert index.crop_size == toy.index.crop_size
    assert len(toy.index.volumes()) == 2  # the old index is as it was


def test_untouched_regions_are_not_taken(toy: Folder) -> None:
    changed = toy.exported(2)
    toy.correct(2, np.where(changed == 0, changed.max() + 1, changed).astype(np.uint32))
    toy.correct(1, toy.exported(1))  # saved again without a change
    done = toy.take()
    assert [region.number for region in done.taken] == [2]
    assert [region.number for region in done.untouched] == [1]
    labels = toy.labels("bare", done)
    assert (labels[slices(toy.regions[0].roi)] == IGNORE).all()
    assert "001" in str(done)
    done = toy.take(accept_unchanged=True, only=[2])
    assert [region.number for region in done.taken] == [2]


def test_nothing_corrected_is_said(toy: Folder) -> None:
    with pytest.raises(ValueError, match=r"none of 2 regions was changed; .*accept_unchanged"):
        toy.take()
    assert not (toy.folder / "manifest.csv").exists()


def test_twice_gives_the_same_and_writes_nothing(toy: Folder) -> None:
    toy.take(accept_unchanged=True, allow_empty=True)
    before = files_of(toy.folder)
    toy.take(accept_unchanged=True, allow_empty=True)
    assert files_of(toy.folder) == before


def test_a_further_region_is_added_later(toy: Folder) -> None:
    for region in toy.regions:
        labels = np.ones(tuple(np.subtract(region.window[3:], region.window[:3])), np.uint8)
        toy.correct(region.number, labels)
    first = toy.take(only=[2])
    old = toy.labels("bare", first)
    old_path = read_manifest(first.manifest).rows[1].label
    both = toy.labels("bare", toy.take())
    assert (both[slices(toy.regions[0].roi)] == 1).all()  # ids follow from the regions' numbers alone
    assert (both[slices(toy.regions[1].roi)] == 2).all()
    assert (np.asarray(zarr.open_array(old_path, mode="r")) == old).all()  # what was written before stays as it was


def test_a_second_round_keeps_the_first(toy: Folder, tmp_path: Path) -> None:
    first = toy.take(accept_unchanged=True, allow_empty=True)
    one = toy.labels("bare", first)
    predictor = BrightBoxes(Grey())
    suggest_regions(
        first.index, tmp_path / "two", predictor=predictor, backbone=predictor.backbone, num=9, margin=(3, 10, 8)
    )
    done = import_annotations(tmp_path / "two", first.manifest, accept_unchanged=True, allow_empty=True, progress=False)
    two = toy.labels("bare", done)
    known = one != IGNORE
    np.testing.assert_array_equal(two[known], one[known])
    assert (two != IGNORE).sum() > known.sum()
    new = two[~known & (two != IGNORE) & (two > 0)]
    assert not set(np.unique(new)) & set(np.unique(one[known & (one > 0)])) or done.num_kept == 0
    assert toy.labels("bare", first).tolist() == one.tolist()


def partial(**changes: Any) -> dict[str, dict[str, Any]]:
    """A volume that is annotated where x < 30: the first two boxes, and 2 of 8 voxels of the fourth, id 4."""
    labels = labels_of(SHAPE, BOXES, changes.pop("dtype", np.uint16))
    labels[:, :, 30:] = np.iinfo(labels.dtype).max
    return {"v": {"image": image_of(SHAPE, dict.fromkeys(BOXES, SURE)), "label": labels, "split": "train"} | changes}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.uint64])
def test_old_labels_stay_and_known_objects_keep_their_ids(tmp_path: Path, dtype: type) -> None:
    # The region is x 32 to 48 of the lower half; box 4 is x 30 to 38 there, and unknown.
    toy = Folder(tmp_path, partial(dtype=dtype), num=1, margin=(0, 0, 8), where="x1 == 32 and z1 == 6 and y1 == 0")
    (region,) = toy.regions
    assert region.roi == (6, 0, 32, 12, 20, 48)
    assert toy.exported(1)[2, 6].tolist() == [0] * 6 + [1] * 8 + [0] * 18  # the window begins at x 24
    corrected = np.zeros((6, 20, 32), np.uint32)
    corrected[1:4, 5:11, 6:14] = 5
    corrected[1:4, 12:16, 10:14] = 9
    toy.correct(1, corrected)
    done = toy.take()
    labels = toy.labels("v", done)
    old = toy.volumes["v"]["label"]
    ignore = np.iinfo(labels.dtype).max
    assert labels.dtype == (np.uint64 if dtype == np.uint64 else np.uint32)
    known = old != np.iinfo(dtype).max
    np.testing.assert_array_equal(labels[known], old[known])
    expected = np.full(SHAPE, ignore, labels.dtype)
    expected[6:12, 0:20, 32:48] = 0
    expected[7:10, 5:11, 32:38] = 3  # old ids are 1 and 2
    expected[7:10, 12:16, 34:38] = 4
    np.testing.assert_array_equal(labels[~known], expected[~known])


def test_an_object_that_was_cut_by_the_old_annotation_goes_on(tmp_path: Path) -> None:
    volumes = partial()
    label = volumes["v"]["label"]
    label[7:10, 5:11, 30:34] = 4  # the annotator of before went on to x 34
    toy = Folder(tmp_path, volumes, num=1, margin=(0, 0, 8), where="x1 == 32 and z1 == 6 and y1 == 0")
    assert toy.regions[0].known_ids == (4,)
    exported = toy.exported(1)
    assert (
        exported[2, 6].tolist() == [0] * 6 + [1] * 4 + [0] * 22
    )  # half of the prediction is known, so it is no new one
    exported[1:4, 5:11, 6:14] = 1
    toy.correct(1, exported)
    labels = toy.labels("v", toy.take())
    assert labels[8, 6, 28:50].tolist() == [0] * 2 + [4] * 8 + [0] * 10 + [IGNORE] * 2
    (record,) = CropIndex(toy.folder / "manifest.sqlite").volumes()
    assert record.num_instances == 3


def test_corrections_of_what_was_annotated_are_dropped_or_taken(tmp_path: Path) -> None:
    toy = Folder(tmp_path, partial(), num=1, margin=(0, 0, 0), pool="all", where="x1 == 0 and z1 == 0 and y1 == 0")
    exported = toy.exported(1)
    assert exported[2, 6].tolist() == [0] * 4 + [1] * 8 + [0] * 4
    exported[1:4, 5:11, 4:6] = 0  # two columns less, and a new object
    exported[0, 0, :3] = 2
    toy.correct(1, exported)
    old = toy.volumes["v"]["label"].astype(np.uint32)
    old[old == 65535] = IGNORE
    done = toy.take()
    np.testing.assert_array_equal(toy.labels("v", done), old)
    assert (done.num_kept, done.num_objects) == (3 * 6 * 2 + 3, 0)
    done = toy.take(replace_known=True)
    old[1:4, 5:11, 4:6], old[0, 0, :3] = 0, 3
    np.testing.assert_array_equal(toy.labels("v", done), old)
    assert (done.num_kept, done.num_objects) == (0, 1)


def test_a_mask_to_ignore_becomes_part_of_the_labels(tmp_path: Path) -> None:
    labels = labels_of(SHAPE, BOXES)
    mask = np.zeros(SHAPE, np.uint8)
    mask[6:] = 1
    (tmp_path / "mask.tif").parent.mkdir(exist_ok=True)
    tifffile.imwrite(tmp_path / "mask.tif", mask, photometric="minisblack")
    row = {"image": image_of(SHAPE, dict.fromkeys(BOXES, SURE)), "label": labels, "ignore": str(tmp_path / "mask.tif")}
    toy = Folder(tmp_path, {"v": row}, num=1, margin=(0, 0, 0), where="x1 == 48 and y1 == 20")
    assert toy.exported(1)[2, 6].tolist() == [0] * 4 + [1] * 8 + [0] * 4
    done = toy.take(accept_unchanged=True)
    found = toy.labels("v", done)
    expected = np.where(mask, np.uint32(IGNORE), labels.astype(np.uint32))
    expected[6:12, 20:40, 48:64] = 0
    expected[7:10, 25:31, 52:60] = 4  # the ids 4 and 5 lie under the mask and are not in use
    np.testing.assert_array_equal(found, expected)
    assert read_manifest(done.manifest).rows[0].ignore is None


def test_objects_that_lie_outside_for_the_most_part_are_ignored(tmp_path: Path) -> None:
    # Box 2 is x 20 to 28; the region begins at x 16. Another is drawn from x 13 to 18: 2 of 5 voxels are inside.
    toy = Folder(tmp_path, num=1, margin=(2, 4, 6), where='name == "bare" and x1 == 16 and y1 == 0 and z1 == 0')
    (region,) = toy.regions
    assert region.window == (0, 0, 10, 8, 24, 38)
    labels = toy.exported(1)
    labels[1:4, 14:18, 3:8] = 7
    labels[1:4, 5:11, 19:27] = 8  # x 29 to 37: 3 of 8 are inside
    toy.correct(1, labels)
    found = toy.labels("bare", toy.take())
    assert found[2, 6, 14:34].tolist() == [IGNORE] * 2 + [0] * 4 + [1] * 8 + [0] + [IGNORE] * 5
    assert found[2, 15, 14:34].tolist() == [IGNORE] * 4 + [0] * 14 + [IGNORE] * 2
    found = toy.labels("bare", toy.take(min_inside=0.4))  # 2 of 5 are enough
    assert found[2, 15, 14:34].tolist() == [IGNORE] * 2 + [2] * 2 + [0] * 14 + [IGNORE] * 2


def test_an_annotator_may_leave_voxels_open(toy: Folder) -> None:
    region = toy.regions[0]
    labels = np.zeros(tuple(np.subtract(region.window[3:], region.window[:3])), np.uint32)
    inside = slices(region.roi, region.window)
    labels[inside][0] = 1
    labels[inside][1] = IGNORE
    toy.correct(1, labels)
    found = toy.labels("bare", toy.take())[slices(region.roi)]
    assert ((found[0] == 1).all(), (found[1] == IGNORE).all(), (found[2:] == 0).all()) == (True, True, True)


def test_zero_one_and_many_instances(toy: Folder) -> None:
    first, second = toy.regions
    shape = tuple(np.subtract(first.window[3:], first.window[:3]))
    toy.correct(1, np.zeros(shape, np.uint16) if toy.exported(1).any() else np.ones(shape, np.uint16))
    many = np.zeros(tuple(np.subtract(second.window[3:], second.window[:3])), np.int64)
    inside = slices(second.roi, second.window)
    many[inside] = np.arange(1, many[inside].size + 1).reshape(many[inside].shape)
    toy.correct(2, many)
    done = toy.take(allow_empty=True)
    found = toy.labels("bare", done)
    count = many[inside].size
    assert done.num_objects == count + int(found[slices(first.roi)].any())
    assert len(np.unique(found[slices(second.roi)])) == count
    index = CropIndex(done.index)
    (record,) = (volume for volume in index.volumes() if volume.name == "bare")
    assert record.num_instances == done.num_objects


def test_all_faults_are_listed_at_once(tmp_path: Path) -> None:
    toy = Folder(tmp_path, num=9, margin=(0, 0, 0), crop_size=(3, 10, 16))
    assert len(toy.regions) == 9
    shape = (3, 10, 16)
    toy.correct(1, np.ones(shape, np.float32))
    toy.correct(2, np.ones((3, 10, 15), np.uint32))
    toy.correct(3, -np.ones(shape, np.int32))
    toy.correct(4, np.full(shape, 2**31, np.uint32))
    (toy.folder / "005" / "labels.tif").unlink()
    toy.correct(6, np.ones(shape, np.uint32), "labels.tiff")
    (toy.folder / "007" / "labels.tif").write_bytes(b"no TIFF")
    toy.correct(8, np.ones((2, *shape), np.uint16))
    toy.correct(9, np.where(toy.exported(9).any(), 0, np.full(shape, IGNORE)).astype(np.uint32))
    with pytest.raises(ValueError, match="fault") as caught:
        toy.take()
    lines = str(caught.value).splitlines()
    for number, message in {
        1: "holds float32 voxels; save ids as integers",
        2: "has shape (3, 10, 15) and was exported as (3, 10, 16)",
        3: "holds the id -1",
        4: "holds the id 2147483648",
        5: "labels.tif is not there",
        6: "labels.tif and labels.tiff are both there; keep the corrected one",
        7: "001",
        8: "axes",
        9: "holds no object; if there is none, say so with allow_empty",
    }.items():
        (line,) = (line for line in lines if line.startswith(f"  {number:03d}: "))
        assert message in line or number == 7
    assert lines[0].endswith("9 fault(s):")
    assert not (toy.folder / "manifest.csv").exists()
    assert not (toy.folder / "labels").exists()


def test_faults_of_the_manifest_are_listed(toy: Folder) -> None:
    del toy.volumes["bare"]
    other = write_manifest(toy.root / "other", toy.volumes)
    with pytest.raises(ValueError, match="its volume 'bare' is not in the manifest"):
        import_annotations(toy.folder, other, accept_unchanged=True)
    toy.volumes["bare"] = {"image": np.zeros((12, 40, 63), np.uint16)}
    other = write_manifest(toy.root / "another", toy.volumes)
    with pytest.raises(ValueError, match=r"was \(12, 40, 64\) voxels \(z, y, x\) and is \(12, 40, 63\) now"):
        import_annotations(toy.folder, other, accept_unchanged=True)


def test_two_classes(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "classes.csv").write_text("id,class\n1,0\n2,1\n")
    volumes = partial(classes="classes.csv")
    volumes["v"]["label"][volumes["v"]["label"] == 4] = 0
    volumes["w"] = {"image": volumes["v"]["image"] + 1, "label": volumes["v"]["label"], "split": "train", "class": 1}
    toy = Folder(tmp_path, volumes, num=2, margin=(0, 0, 0), where="x1 == 32 and z1 == 6 and y1 == 0")
    for number in (1, 2):
        labels = toy.exported(number)
        labels[labels == 0] = 9
        toy.correct(number, labels)
    with pytest.raises(ValueError, match=r"2 fault\(s\)(.|\n)*ids \[9\] have no class; add them to classes.csv"):
        toy.take()
    for number in (1, 2):
        with (toy.folder / f"{number:03d}" / "classes.csv").open("a") as file:
            file.write("9,1\n")
    done = toy.take()
    assert done.manifest == toy.folder / "manifest.json"  # a CSV holds no tables of classes
    rows = {row.name: row for row in read_manifest(done.manifest).rows}
    assert rows["v"].classes == {1: 0, 2: 1, 3: 0, 4: 1}  # the predicted object, and the rest
    assert rows["w"].classes == {1: 1, 2: 1, 3: 0, 4: 1}
    assert CropIndex(done.index).num_classes == 2


def test_files_of_the_user_are_never_overwritten(toy: Folder) -> None:
    with pytest.raises(ValueError, match="is the manifest itself"):
        toy.take(accept_unchanged=True, output=toy.manifest)
    mine = toy.root / "mine.csv"
    mine.write_text("image\n")
    with pytest.raises(ValueError, match="exists and was not written by an import"):
        toy.take(accept_unchanged=True, allow_empty=True, output=mine)
    assert mine.read_text() == "image\n"
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        toy.take(accept_unchanged=True, output=toy.root / "no" / "new.csv")
    done = toy.take(accept_unchanged=True, allow_empty=True)
    done.manifest.write_text(done.manifest.read_text() + "\n")  # edited since
    with pytest.raises(ValueError, match="exists and was not written by an import"):
        toy.take(accept_unchanged=True, allow_empty=True)


@pytest.mark.parametrize("place", ["labels", "manifest"])
def test_a_kill_leaves_the_old_manifest(toy: Folder, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    toy.correct(1, toy.exported(1) + 1)
    first = toy.take()
    before = first.manifest.read_bytes()
    old = toy.labels("bare", first)
    toy.correct(2, toy.exported(2) + 1)

    def killed(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if place == "labels":
            patch.setattr(merge, "_without_outsiders", killed)  # in the middle of a volume
        else:
            patch.setattr(
                import_labels, "read_manifest", Mock(side_effect=[read_manifest(toy.manifest), KeyboardInterrupt])
            )
        with pytest.raises(KeyboardInterrupt):
            toy.take()
    assert first.manifest.read_bytes() == before
    np.testing.assert_array_equal(toy.labels("bare", first), old)
    done = toy.take()
    again = Folder(toy.root / "fresh")
    for number in (1, 2):
        shutil.copy(toy.folder / f"{number:03d}" / "labels.tif", again.folder / f"{number:03d}" / "labels.tif")
    np.testing.assert_array_equal(toy.labels("bare", done), again.labels("bare", again.take()))
    assert not list(toy.folder.rglob("*.partial"))


def test_without_splits_those_of_the_index_are_pinned(tmp_path: Path) -> None:
    image = image_of(SHAPE, dict.fromkeys(BOXES, SURE))
    labels = labels_of(SHAPE, BOXES)
    volumes = {"E1_0": {"image": image, "label": labels}, "E2_0": {"image": image + 1, "label": labels}}
    volumes["E1_1"] = {"image": image + 2}
    path = write_manifest(tmp_path / "data", volumes)
    manifest = read_manifest(path, specimen_pattern="^(E.)_")
    split = {"E1": "train", "E2": "val"}
    rows = tuple(replace(row, split=split[row.specimen] if row.label else None) for row in manifest.rows)
    index = build_index(
        replace(manifest, rows=rows), tmp_path / "i.sqlite", DataConfig(crop_size=(6, 20, 16)), progress=False
    )
    predictor = BrightBoxes(Grey())
    training = {"bundle": "maskdino3d", "checkpoint": "a b.pt", "overlay": "x,y", "in_channels": 2, "num_classes": 1}
    suggest_regions(
        index.path, tmp_path / "out", predictor=predictor, backbone=predictor.backbone, num=1, training=training
    )
    done = import_annotations(tmp_path / "out", path, accept_unchanged=True, allow_empty=True, progress=False)
    found = {row.name: (row.specimen, row.split) for row in read_manifest(done.manifest).rows}
    assert found == {"E1_0": ("E1", "train"), "E2_0": ("E2", "val"), "E1_1": ("E1", "train")}
    words = shlex.split(done.command)
    assert words[:5] == ["seg3d", "train", "maskdino3d", "--overlay", "x,y"]
    flags = dict(zip(words[5::2], words[6::2], strict=True))
    assert flags == {
        "--dataset_dir": str(done.manifest),
        "--initial_weights": "a b.pt",
        "--in_channels": "2",
        "--index#val_specimens": "[]",
        "--index#test_specimens": "[]",
        "--output_dir": str(tmp_path / "out" / "run"),
    }


def test_training_never_sees_what_nobody_annotated_as_background(toy: Folder) -> None:
    for region in toy.regions:
        labels = np.zeros(tuple(np.subtract(region.window[3:], region.window[:3])), np.uint32)
        inside = labels[slices(region.roi, region.window)]
        inside[1:4, 4:9, 3:9], inside[1:4, 12:18, :4] = 1, 2
        toy.correct(region.number, labels)
    done = toy.take()
    annotated = toy.labels("bare", done) != IGNORE
    dataset = CropDataset(
        CropIndex(done.index),
        num_samples=40,
        crop_size=(6, 16, 14),
        split="train",
        where='name == "bare"',
        min_visible=0.0,
        margin=(1, 2, 2),
    )
    seen = set()
    for number in range(40):
        sample = dataset[number]
        label = sample["targets"]["label"].numpy()
        z1, y1, x1, z2, y2, x2 = sample["roi"]
        np.testing.assert_array_equal(label[annotated[z1:z2, y1:y2, x1:x2]] >= 0, True)
        np.testing.assert_array_equal(label[~annotated[z1:z2, y1:y2, x1:x2]], -1)
        seen |= set(sample["targets"]["ids"].tolist())
    assert seen == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("options", "message"), [({"min_inside": 2.0}, "min_inside=2.0"), ({"only": [7]}, r"\[7\] are no regions")]
)
def test_wrong_options_are_named(toy: Folder, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy.take(**options)


def test_no_task(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give the folder that `seg3d annotate suggest` wrote"):
        import_annotations(tmp_path, tmp_path)
