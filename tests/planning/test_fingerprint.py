"""The fingerprint says what was drawn into the volumes, of the training split alone."""

import numpy as np
import pytest
from planning_toys import BOXES, SHAPE, fingerprint_of, rows_of_boxes, volume_facts, write_index

from seg3d_monai.data import CropIndex
from seg3d_monai.planning import fingerprint as module
from seg3d_monai.planning import take_fingerprint
from seg3d_monai.planning.fingerprint import training_volumes


def test_numbers_of_a_volume_counted_by_hand(tmp_path):
    big = {1: (1, 1, 1, 9, 15, 15)}
    index = write_index(tmp_path, {"a": (SHAPE, BOXES), "kept_back": ((10, 16, 16), big)}, {"split": ["train", "val"]})
    facts = take_fingerprint(index).to_json()
    assert facts["num_volumes"] == 1
    assert (facts["num_objects"], facts["num_objects_read"], facts["num_objects_whole"]) == (4, 4, 3)
    middle = facts["percentiles"].index(50)
    assert facts["object_extent_voxels"][middle] == [3, 6, 6]
    assert facts["object_extent_um"][middle] == [6, 6, 6]
    assert facts["object_extent_voxels"][-1] == [4, 6, 8]
    assert facts["object_voxels"][middle] == 3 * 6 * 6
    assert facts["size_voxels"][0] == list(SHAPE)
    assert facts["foreground"][middle] == pytest.approx((192 + 108 + 12 + 32) / np.prod(SHAPE), abs=1e-4)
    assert facts["spacings_um"] == [{"zyx": [2.0, 1.0, 1.0], "volumes": 1}]
    assert (facts["touching"], facts["touching_is_of"]) == (pytest.approx(2 / 3), 3)
    assert facts["classes"] == {0: 4}
    assert 170 < facts["intensity_low"][0] < 200 < 450 < facts["intensity_high"][0]


def test_objects_that_a_volume_cuts_count_where_there_are_no_others():
    print_ = fingerprint_of([(0, 0, 0, *SHAPE)])
    assert print_.is_whole.tolist() == [True]
    print_ = fingerprint_of([(0, 0, 0, *SHAPE), (1, 1, 1, 2, 2, 2)])
    assert print_.is_whole.tolist() == [False, True]
    # One speck within a stack whose cells all reach its faces says nothing about their size.
    print_ = fingerprint_of([(0, 1, 1, 12, 9, 9)] * 10 + [(1, 1, 1, 2, 2, 2)])
    assert print_.is_whole.all()


def test_extents_in_voxels_of_a_target():
    volumes = [volume_facts("a", spacing_um=(2.0, 1.0, 1.0)), volume_facts("b", spacing_um=(2.1, 0.5, 0.5))]
    print_ = fingerprint_of([(1, 1, 1, 5, 7, 9), (1, 1, 1, 5, 13, 17)], volumes, [0, 1])
    assert print_.spacing_um == (2.05, 0.75, 0.75)
    np.testing.assert_allclose(print_.extents(), [[4, 6, 8], [4, 12, 16]])
    # As near as 10 % along every axis, a volume is not resampled at all.
    np.testing.assert_allclose(print_.extents((2.0, 1.0, 1.0)), [[4, 6, 8], [4.2, 6, 8]])
    np.testing.assert_allclose(print_.scales((2.05, 1.05, 1.0))[0], 1)
    np.testing.assert_allclose(print_.sizes((2.0, 1.0, 1.0)), [4 * 6 * 8, 4.2 * 6 * 8])
    np.testing.assert_allclose(print_.shapes((2.0, 1.0, 1.0))[1], [12.6, 10, 12])


def test_a_voxel_size_that_one_volume_does_not_know_is_no_common_one():
    volumes = [volume_facts("a"), volume_facts("b", spacing_um=None)]
    print_ = fingerprint_of([(1, 1, 1, 5, 7, 9)], volumes)
    assert print_.spacing_um is None
    assert print_.without_spacing == ["b"]
    assert print_.to_json()["object_extent_um"] == [[8, 6, 8]] * 7  # the object is in a


def test_without_a_split_a_training_split_is_taken_by_specimen(tmp_path):
    names = [f"v{n}" for n in range(10)]
    index = write_index(
        tmp_path,
        {name: ((6, 8, 8), {1: (1, 1, 1, 4, 5, 5)}) for name in names},
        {"split": [""] * 10, "specimen": [f"s{n // 2}" for n in range(10)]},
    )
    chosen, words = training_volumes(index)
    assert len(chosen) == 8
    left_out = {record.specimen for record in index.volumes()} - {record.specimen for record in chosen}
    assert len(left_out) == 1
    assert "20%" in words


def test_only_volumes_for_training_are_enough(tmp_path):
    box = {1: (1, 1, 1, 4, 5, 5)}
    index = write_index(tmp_path, {"a": ((6, 8, 8), box)}, {"split": ["val"]})
    with pytest.raises(ValueError, match=r"no labelled volume for training \(splits of labelled volumes: val\)"):
        take_fingerprint(index)


def test_an_index_without_objects_is_refused(tmp_path):
    index = write_index(tmp_path, {"a": ((6, 8, 8), {}), "b": ((6, 8, 8), {})})
    with pytest.raises(ValueError, match=r"the 2 training volumes of i\.sqlite hold no object"):
        take_fingerprint(index)


def test_of_very_many_objects_those_of_a_part_are_read(tmp_path, monkeypatch):
    shape = (20, 48, 56)
    boxes = rows_of_boxes(shape, (2, 4, 4))  # 4 x 7 x 9 = 252 objects, 4, 6 and 6 voxels apart
    index = write_index(tmp_path, {"a": (shape, boxes)})
    monkeypatch.setattr(module, "MOST_OBJECTS", 32)  # about an eighth: half of each extent
    monkeypatch.setattr(module, "OBJECTS_AT_ONCE", 50)
    found = take_fingerprint(CropIndex(index.path))
    (facts,) = found.volumes
    assert facts.part_shape == (10, 24, 28)
    assert facts.num_objects == len(boxes) == 252
    assert facts.num_read == len(found.boxes)
    low, high = np.array(facts.part[:3]), np.array(facts.part[3:])
    inside = [
        number for number, box in boxes.items() if all(low[a] <= (box[a] + box[a + 3]) // 2 < high[a] for a in range(3))
    ]
    assert sorted(map(tuple, found.boxes.tolist())) == sorted(boxes[number] for number in inside)
    assert found.densities()[0] == pytest.approx(1 / (4 * 6 * 6), rel=0.35)
    ends = found.boxes[found.is_whole]
    assert (ends[:, :3] > low).all()
    assert (ends[:, 3:] < high).all()
    assert found.to_json()["num_objects"] == 252


def test_of_very_many_volumes_every_so_many_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_VOLUMES", 2)
    box = {1: (1, 1, 1, 4, 5, 5)}
    index = write_index(tmp_path, {f"v{n}": ((6, 8, 8), box) for n in range(5)})
    assert [volume.name for volume in take_fingerprint(index).volumes] == ["v0", "v3"]
