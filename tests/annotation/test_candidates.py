"""Which regions may be suggested: never of another split or its specimens, evenly over specimens, by the seed."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from annotate_toys import CROP, SHAPE, image_of, index_of, labels_of, write_manifest

from seg3d_monai.annotation.candidates import _even_shares, draw_annotated, draw_candidates, grown
from seg3d_monai.data import CropIndex

BOXES = [(1, 2, 3, 4, 8, 9), (7, 22, 34, 10, 30, 44)]


@pytest.fixture
def index(tmp_path: Path) -> CropIndex:
    """Crops of 6x20x16 in 12x40x64: 2 x 2 x 4 = 16 a volume. "half" is annotated in its upper crops only."""
    image, labels = image_of(SHAPE, dict.fromkeys(BOXES, 900)), labels_of(SHAPE, BOXES)
    half = labels.copy()
    half[6:] = np.iinfo(half.dtype).max
    volumes = {
        "whole": {"image": image, "label": labels, "specimen": "a", "split": "train", "quality_image": 3},
        "half": {"image": image + 1, "label": half, "specimen": "b", "split": "train", "quality_image": 2},
        "bare": {"image": image + 2, "specimen": "c", "quality_image": 1},
        "judged": {"image": image + 3, "label": labels, "specimen": "d", "split": "val", "quality_image": 3},
        "near": {"image": image + 4, "specimen": "d", "quality_image": 3},
    }
    return index_of(write_manifest(tmp_path, volumes))


def names(found: list) -> dict[str, int]:
    return dict(Counter(one.volume.name for one in found))


def test_unannotated_crops_of_the_split_and_of_volumes_without_one(index: CropIndex) -> None:
    found = draw_candidates(index, number=99)
    assert names(found) == {"half": 8, "bare": 16}  # not "near", whose specimen is judged on
    assert all(one.roi[0] == 6 for one in found if one.volume.name == "half")
    assert len({(one.volume.name, one.roi) for one in found}) == 24


def test_all_crops_and_a_filter(index: CropIndex) -> None:
    assert names(draw_candidates(index, number=99, pool="all")) == {"whole": 16, "half": 16, "bare": 16}
    assert names(draw_candidates(index, number=99, where="quality_image >= 2")) == {"half": 8}
    assert names(draw_candidates(index, number=99, pool="all", where="quality_image == 3 or z1 > 0")) == {
        "whole": 16,
        "half": 8,
        "bare": 8,
    }
    found = names(draw_candidates(index, number=99, pool="all", split="val"))
    assert found == {"bare": 16, "judged": 16, "near": 16}


def test_annotated_crops(index: CropIndex) -> None:
    found = draw_annotated(index, number=99)
    assert names(found) == {"whole": 16, "half": 8}
    assert all(one.roi[0] == 0 for one in found if one.volume.name == "half")
    assert draw_annotated(index, number=0) == []


def test_specimens_have_even_shares_and_the_seed_decides(index: CropIndex) -> None:
    first, again, other = (draw_candidates(index, number=10, pool="all", seed=seed) for seed in (1, 1, 2))
    assert sorted(names(first).values()) == [3, 3, 4]
    assert first == again
    assert first != other
    assert names(draw_candidates(index, number=20)) == {"half": 8, "bare": 12}


def test_shares() -> None:
    assert _even_shares({"a": 1, "b": 10, "c": 10}, 7) == {"a": 1, "b": 3, "c": 3}
    assert _even_shares({"a": 2, "b": 2}, 99) == {"a": 2, "b": 2}
    assert _even_shares({"b": 9, "a": 9}, 3) == {"b": 1, "a": 2}
    assert _even_shares({}, 3) == {}


def test_regions_of_another_size_stay_in_the_volume_and_are_counted_once(index: CropIndex) -> None:
    found = draw_candidates(index, number=99, where='name == "bare"', crop_size=(4, 30, 99))
    # Along x all of the volume; along y 30 of 40 about the centres 10 and 30, moved inside; along z about 3 and 9.
    assert {one.roi for one in found} == {(z, y, 0, z + 4, y + 30, 64) for z in (1, 7) for y in (0, 10)}
    assert all(np.subtract(one.roi[3:], one.roi[:3]).tolist() == list(CROP) for one in draw_candidates(index, number=9))


def test_a_margin_is_clipped() -> None:
    assert grown((0, 10, 20, 4, 30, 40), (2, 5, 50), (5, 40, 60)) == (0, 5, 0, 5, 35, 60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "some"}, "pool='some' is unknown; use one of unannotated, all"),
        ({"split": "trian"}, "split='trian'"),
        ({"where": "qualty_image > 2"}, "quality_image"),
        ({"where": "quality_image > 5"}, "no crop of manifest.sqlite in the split 'train'"),
        ({"where": 'name == "whole"'}, "look at all with pool=all"),
        ({"crop_size": (4, 4)}, r"crop_size=\[4, 4\]"),
        ({"number": 0}, "candidates=0"),
    ],
)
def test_what_makes_no_sense_is_named(index: CropIndex, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_candidates(index, **{"number": 9} | options)
