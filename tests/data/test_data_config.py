"""The configuration of an index: what it accepts, and that it is the same after JSON."""

import json
from typing import Any

import pytest

from seg3d_monai.data import DataConfig


def test_stride_and_overlap_say_the_same() -> None:
    a = DataConfig(crop_size=(32, 64, 96), stride=(24, 48, 96))
    b = DataConfig(crop_size=(32, 64, 96), overlap=(8, 16, 0))
    assert a == b
    assert a.to_json() == b.to_json()
    assert b.step == (24, 48, 96)


def test_defaults_are_half_a_crop() -> None:
    assert DataConfig(crop_size=(1, 5, 8)).step == (1, 2, 4)


def test_json_and_back() -> None:
    config = DataConfig(crop_size=(4, 6, 8), min_object_voxels=9, percentiles=(2, 98), where=" quality_image > 1 ")
    values = json.loads(json.dumps(config.to_json()))
    assert DataConfig.from_json(values) == config
    assert values["where"] == "quality_image > 1"
    assert DataConfig.from_json(DataConfig(where="").to_json()).where is None
    with pytest.raises(ValueError, match="crop: no such key"):
        DataConfig.from_json({"crop": [1, 2, 3]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_size": (4, 8)}, "crop_size"),
        ({"crop_size": 4}, "crop_size"),
        ({"crop_size": (4, 0, 8)}, "crop_size"),
        ({"crop_size": (1, 1, 70_000)}, "too large"),
        ({"crop_size": (2048, 2048, 2048)}, "too large"),
        ({"crop_size": (4, 8, 6), "stride": (5, 4, 6)}, "larger than crop_size"),
        ({"crop_size": (4, 8, 6), "overlap": (4, 0, 0)}, "not smaller than crop_size"),
        ({"overlap": (-1, 0, 0)}, "overlap"),
        ({"stride": (8, 8, 8), "overlap": (8, 8, 8)}, "say the same thing"),
        ({"min_voxels": -1}, "min_voxels=-1"),
        ({"min_object_voxels": -1}, "min_object_voxels=-1"),
        ({"percentiles": (99, 1)}, "percentiles"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)
