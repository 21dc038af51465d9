"""Suggestions with a predictor whose scores are known: what is chosen, what is exported, what is refused."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from annotate_toys import CROP, SHAPE, SPACING, BrightBoxes, Grey, image_of, index_of, labels_of, write_manifest

from seg3d_monai.annotation import Suggestions, suggest_regions
from seg3d_monai.annotation.task import labels_digest, read_task
from seg3d_monai.data import CropIndex

SURE, UNSURE = 980, 500
IGNORE = 65535


def suggest(index: CropIndex, output: Path, predictor: BrightBoxes | None = None, **options: Any) -> Suggestions:
    predictor = predictor or BrightBoxes(Grey())
    return suggest_regions(
        index.path, output, predictor=predictor, backbone=predictor.backbone, progress=False, **options
    )


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "suggestions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def boxes_in(grey: int, *corners: tuple[int, int, int]) -> dict:
    return {(z, y, x, z + 3, y + 6, x + 8): grey for z, y, x in corners}


@pytest.fixture
def index(tmp_path: Path) -> CropIndex:
    """An annotated volume, and one that is not: sure cells in eight crops, unsure ones in the crop at (6, 20, 32)."""
    everywhere = [(z, y, x) for z in (1, 7) for y in (5, 25) for x in (4, 20, 36, 52)]
    annotated = boxes_in(SURE, *everywhere)
    bare = boxes_in(SURE, *everywhere[:8]) | boxes_in(UNSURE, (7, 25, 36))
    volumes = {
        "known": {"image": image_of(SHAPE, annotated), "label": labels_of(SHAPE, [*annotated]), "split": "train"},
        "bare": {"image": image_of(SHAPE, bare), "label": None, "split": ""},
    }
    return index_of(write_manifest(tmp_path / "data", volumes))


def test_the_uncertain_region_among_sure_ones_is_first(index: CropIndex, tmp_path: Path) -> None:
    done = suggest(index, tmp_path / "out", num=3, margin=(0, 0, 0), unlike_weight=0.0)
    assert (done.num_regions, done.num_candidates) == (3, 16)
    first, second, third = table(tmp_path / "out")
    assert [first[name] for name in ("volume", "z1", "y1", "x1", "z2", "y2", "x2")] == [
        *("bare", "6", "20", "32", "12", "40", "48")
    ]
    assert (first["doubt"], first["uncertainty"], first["objects"]) == ("0.500", "0.938", "1")  # 15 of 16 are surer
    assert second["doubt"] == third["doubt"] == "0.020"
    assert "seg3d annotate import" in str(done)


def test_what_is_unlike_the_annotated_is_first_by_unlikeness_alone(index: CropIndex, tmp_path: Path) -> None:
    # Crops without a cell are the ones that look like nothing annotated: every annotated crop holds a bright one.
    suggest(index, tmp_path / "out", num=1, margin=(0, 0, 0), unlike_weight=1.0)
    (row,) = table(tmp_path / "out")
    assert (row["z1"], row["objects"], row["unlikeness"]) == ("6", "0", "1.000")


def test_margins_are_shown_and_regions_do_not_meet(index: CropIndex, tmp_path: Path) -> None:
    predictor = BrightBoxes(Grey())
    done = suggest(index, tmp_path / "out", predictor, num=16, margin=(2, 3, 4))
    task = read_task(tmp_path / "out")
    windows = [region.window for region in task.regions]
    assert done.num_regions == len(windows) < 16
    for a in range(len(windows)):
        for b in range(a):
            low, high = np.maximum(windows[a][:3], windows[b][:3]), np.minimum(windows[a][3:], windows[b][3:])
            assert (low >= high).any()
    for region in task.regions:
        assert np.subtract(region.roi[3:], region.roi[:3]).tolist() == list(CROP)
        low, high = np.subtract(region.roi[:3], (2, 3, 4)), np.add(region.roi[3:], (2, 3, 4))
        assert region.window == (*np.maximum(low, 0).tolist(), *np.minimum(high, SHAPE).tolist())
        folder = tmp_path / "out" / region.folder
        z1, y1, x1, z2, y2, x2 = region.window
        image = tifffile.imread(index.volumes(labelled=False)[0].image)[z1:z2, y1:y2, x1:x2]
        np.testing.assert_array_equal(tifffile.imread(folder / "image.tif"), image)
        labels = tifffile.imread(folder / "labels.tif")
        assert labels_digest(labels) == region.labels_sha256
        np.testing.assert_array_equal(labels > 0, image >= UNSURE)
    assert set(predictor.rois) >= set(windows)


def test_the_same_seed_gives_the_same_bytes(index: CropIndex, tmp_path: Path) -> None:
    for name in ("a", "b"):
        suggest(index, tmp_path / name / "out", num=3, candidates=9, seed=4, margin=(1, 0, 0))
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 2 + 3 * 3  # the table, the task; image, margin and labels of each region
    for file in files:
        a, b = ((tmp_path / name / file).read_bytes() for name in ("a", "b"))
        assert a.replace(str(tmp_path / "a").encode(), b"") == b.replace(str(tmp_path / "b").encode(), b"")
    suggest(index, tmp_path / "c", num=3, candidates=9, seed=5, margin=(1, 0, 0))
    assert [row["x1"] for row in table(tmp_path / "c")] != [row["x1"] for row in table(tmp_path / "a" / "out")]


def test_random_regions_are_drawn_without_a_look(index: CropIndex, tmp_path: Path) -> None:
    predictor = BrightBoxes(Grey())
    suggest(index, tmp_path / "out", predictor, num=2, margin=(0, 0, 0), strategy="random", seed=1)
    rows = table(tmp_path / "out")
    assert [(row["doubt"], row["unlikeness"]) for row in rows] == [("", "")] * 2
    assert len(predictor.rois) == 2  # for the labels to correct
    chosen = set()
    for seed in range(8):
        suggest(index, tmp_path / str(seed), num=1, strategy="random", seed=seed)
        chosen.add(tuple(table(tmp_path / str(seed))[0][name] for name in ("z1", "y1", "x1")))
    assert len(chosen) > 4


def test_partial_annotations_are_shown_and_kept(tmp_path: Path) -> None:
    boxes = [*boxes_in(SURE, (1, 5, 4), (1, 25, 4), (1, 5, 28))]
    labels = labels_of(SHAPE, boxes) * 100
    labels[:, :, 30:] = IGNORE  # the third box, id 300, is cut: x 28 and 29 are annotated
    row = {"image": image_of(SHAPE, dict.fromkeys(boxes, SURE)), "label": labels, "split": "train"}
    index = index_of(write_manifest(tmp_path / "data", {"v": row}))
    suggest(index, tmp_path / "out", num=1, margin=(0, 0, 20), where="x1 == 32 and z1 == 0 and y1 == 0")
    (region,) = read_task(tmp_path / "out").regions
    assert (region.roi, region.window) == ((0, 0, 32, 6, 20, 48), (0, 0, 12, 6, 20, 64))
    assert region.known_ids == (300,)
    exported = tifffile.imread(tmp_path / "out" / "001" / "labels.tif")
    expected = np.zeros((6, 20, 52), np.uint32)
    expected[1:4, 5:11, 16:18] = 1
    expected[1:4, 5:11, 18:24] = 2  # most of it was not annotated
    np.testing.assert_array_equal(exported, expected)


def test_two_channels_and_two_classes(tmp_path: Path) -> None:
    boxes = [*boxes_in(SURE, (1, 5, 4), (1, 5, 20), (7, 25, 4), (7, 25, 20))]
    labels = labels_of(SHAPE, boxes[:2])
    labels[6:] = IGNORE
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "classes.csv").write_text("id,class\n1,0\n2,1\n")
    image = image_of(SHAPE, dict.fromkeys(boxes, SURE), channels=2)
    row = {"image": image, "label": labels, "split": "train", "axes": "CZYX", "classes": "classes.csv"}
    index = index_of(write_manifest(tmp_path / "data", {"v": row}))
    assert index.num_classes == 2
    predictor = BrightBoxes(Grey(), classes=2)
    where = "y1 == 20 and x1 == 0"
    suggest(index, tmp_path / "out", predictor, num=1, margin=(6, 0, 0), crop_size=(6, 20, 32), where=where)
    folder = tmp_path / "out" / "001"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["classes.csv", "image_0.tif", "image_1.tif", "labels.tif", "margin.tif"]
    np.testing.assert_array_equal(tifffile.imread(folder / "image_1.tif"), image[1, :, 20:, :32])
    assert (folder / "classes.csv").read_text().split() == ["id,class", "1,0", "2,1"]


def test_regions_of_a_single_grey_value_are_not_suggested(tmp_path: Path) -> None:
    image = image_of(SHAPE, boxes_in(SURE, (1, 5, 4)))
    padded = image.copy()
    padded[:, :, 16:] = 0
    labels = labels_of(SHAPE, [*boxes_in(1, (1, 5, 4))])
    volumes = {"known": {"image": image, "label": labels}, "padded": {"image": padded}}
    index = index_of(write_manifest(tmp_path / "data", volumes))
    done = suggest(index, tmp_path / "out", num=9, margin=(0, 0, 0))
    assert done.num_candidates == 4
    assert {row["x1"] for row in table(tmp_path / "out")} == {"0"}
    with pytest.raises(ValueError, match="all 12 candidates are of a single grey value"):
        suggest(index, tmp_path / "none", num=9, margin=(0, 0, 4), where="x1 > 0")


def test_one_plane(tmp_path: Path) -> None:
    shape = (1, 40, 64)
    image = image_of(shape, {(0, 5, 4, 1, 12, 12): SURE})
    volumes = {"a": {"image": image, "label": labels_of(shape, [(0, 5, 4, 1, 12, 12)])}, "b": {"image": image + 1}}
    index = index_of(write_manifest(tmp_path / "data", volumes), crop_size=(1, 20, 16), stride=(1, 20, 16))
    suggest(index, tmp_path / "out", num=1, margin=(0, 4, 4), unlike_weight=0.0)
    region = read_task(tmp_path / "out").regions[0]
    assert region.roi == (0, 0, 0, 1, 20, 16)


def test_a_folder_that_holds_something_is_never_touched(index: CropIndex, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    suggest(index, folder, num=1)  # an empty one is taken
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    with pytest.raises(ValueError, match="holds something already; give a new folder"):
        suggest(index, folder, num=1)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


def test_a_run_that_was_killed_leaves_no_folder(index: CropIndex, tmp_path: Path) -> None:
    class Dies(BrightBoxes):
        def __call__(self, block: Any, roi: Any) -> Any:
            if len(self.rois) == 16 + 1:  # while the second region is exported
                raise KeyboardInterrupt
            return super().__call__(block, roi)

    with pytest.raises(KeyboardInterrupt):
        suggest(index, tmp_path / "out", Dies(Grey()), num=3, margin=(0, 0, 0), candidates=16)
    assert not (tmp_path / "out").exists()
    suggest(index, tmp_path / "out", num=3, margin=(0, 0, 0), candidates=16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "best"}, "strategy='best' is unknown; use one of model, random"),
        ({"margin": (1, 2)}, r"margin=\[1, 2\]"),
        ({"margin": (1, 2, -1)}, r"margin=\[1, 2, -1\]"),
        ({"num": 0}, "num=0"),
        ({"unlike_weight": 2.0}, "unlike_weight=2.0"),
    ],
)
def test_what_makes_no_sense_is_named(index: CropIndex, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        suggest(index, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_predictor_that_returns_something_else(index: CropIndex, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="the predictor returned NoneType"):
        suggest_regions(
            index.path, tmp_path / "out", predictor=lambda block, roi: None, backbone=Grey(), progress=False
        )


def test_the_task_remembers_what_the_import_needs(index: CropIndex, tmp_path: Path) -> None:
    suggest(index, tmp_path / "out", num=1, training={"bundle": "b", "checkpoint": "m.pt"})
    task = read_task(tmp_path / "out")
    assert (task.index, task.split, task.num_classes) == (str(index.path), "train", 1)
    assert task.splits == {"known": "train", "bare": None}
    assert task.training == {"bundle": "b", "checkpoint": "m.pt"}
    content = json.loads((tmp_path / "out" / "task.json").read_text())
    for wrong in ({**content, "version": 9}, {**content, "format": "x"}, {**content, "regions": [{}]}):
        (tmp_path / "out" / "task.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="is no annotation task"):
            read_task(tmp_path / "out")
    assert index.volumes()[0].spacing_um == SPACING
