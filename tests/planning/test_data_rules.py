"""Each rule for the data on examples that are worked out by hand."""

import numpy as np
import pytest
from planning_toys import fingerprint_of, volume_facts

from seg3d_monai.planning import data_rules as rules

BOX = [(1, 1, 1, 5, 7, 9)]


def spacings(*sizes):
    return fingerprint_of(BOX, [volume_facts(f"v{n}", spacing_um=size) for n, size in enumerate(sizes)])


def test_volumes_that_agree_are_not_resampled():
    assert rules.target_spacing(spacings((2, 1, 1), (2.1, 1, 1.05), (2, 0.95, 1)))[0] is None


def test_volumes_that_differ_get_the_median():
    target, reason = rules.target_spacing(spacings((2, 1, 1), (2, 0.5, 0.5), (3, 0.8, 0.8)))
    assert target == [2, 0.8, 0.8]
    assert "median" in reason


def test_thick_planes_follow_the_finer_volumes():
    sizes = [(n, 1, 1) for n in (2, 4, 6, 8, 10)]
    target, reason = rules.target_spacing(spacings(*sizes))
    assert target == [pytest.approx(2.8), 1, 1]  # the tenth percentile of 2, 4, 6, 8, 10
    assert "along z" in reason
    assert rules.target_spacing(spacings((0.5, 1, 1), (6, 1, 1), (6, 1, 1)))[0] == [pytest.approx(1.6), 1, 1]
    # Not finer than the other axes are.
    assert rules.target_spacing(spacings(*[(0.2, 1, 1)] * 2, *[(6, 1, 1)] * 3))[0] == [1, 1, 1]


def test_without_a_voxel_size_nothing_is_resampled_and_the_volume_is_named():
    target, reason = rules.target_spacing(spacings((2, 1, 1), None, (2, 0.5, 0.5)))
    assert target is None
    assert "v1 do not say their voxel size, 2 do: everything is planned in voxels" in reason


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([1000.0] * 9, None),
        ([1000.0] * 95 + [50.0] * 5, 100),  # 5 % below a tenth of the median
        ([1000.0] * 80 + [50.0] * 20, None),  # a kind of cell
        ([2119.0] * 95 + [33.0] * 5, 210),
        ([7.0], None),
    ],
)
def test_debris(sizes, expected):
    assert rules.smallest_object(np.array(sizes))[0] == expected


@pytest.mark.parametrize(
    ("sizes", "expected"), [([1000.0] * 9, 50), ([100.0] + [1000.0] * 9, 50), ([60.0] * 9 + [1000.0] * 9, 26)]
)
def test_smallest_mask(sizes, expected):
    # a twentieth of the median: 50; a half of the first percentile: more, then 30 against 26.5
    assert rules.smallest_mask(np.array(sizes))[0] == expected


def test_smallest_mask_of_tiny_objects_is_a_voxel():
    assert rules.smallest_mask(np.array([2.0]))[0] == 1


def test_crop_by_hand():
    # 3.5 * (14, 18, 17) = (49, 63, 59.5); y and x are made equal: 63 -> 64 in steps of 16, 49 -> 48 in steps of 8.
    size, reason = rules.crop_size((14, 18, 17), (21, 25, 23), (51, 128, 127), (8, 16, 16), True)
    assert size == (48, 64, 64)
    assert "not more than" not in reason
    size, reason = rules.crop_size((14, 18, 17), (21, 25, 23), (43, 128, 127), (8, 16, 16), True)
    assert size == (40, 64, 64)
    assert "not more than the median volume (43 x 128 x 127) has" in reason
    # Large objects decide: 1.5 * 60 = 90 -> 96.
    assert rules.crop_size((10, 10, 10), (60, 60, 60), (500, 500, 500), (8, 16, 16), True)[0] == (88, 96, 96)
    # Voxels longer along x: y and x are free.
    assert rules.crop_size((8, 30, 10), (8, 30, 10), (500, 500, 500), (8, 16, 16), False)[0] == (32, 112, 32)


@pytest.mark.parametrize(
    ("volume", "expected"),
    [
        ((1, 64, 64), (1, 64, 64)),  # one plane
        ((3, 64, 64), (2, 64, 64)),
        ((40, 20, 64), (32, 16, 16)),  # squares fit the shorter of the two
        ((40, 9, 9), (32, 8, 8)),
    ],
)
def test_crop_of_thin_and_small_volumes(volume, expected):
    assert rules.crop_size((10, 16, 16), (12, 18, 18), volume, (8, 16, 16), True)[0] == expected


def test_a_smaller_crop_loses_context_where_there_is_most():
    median, least, strides = (14, 18, 17), (24, 32, 32), (8, 16, 16)
    assert rules.smaller_crop((48, 96, 80), median, least, strides) == (48, 80, 80)
    assert rules.smaller_crop((48, 32, 32), median, least, strides) == (40, 32, 32)
    assert rules.smaller_crop((24, 32, 32), median, least, strides) is None


@pytest.mark.parametrize(("objects", "expected"), [(20.0, 2), (4.0, 2), (2.0, 4), (1.0, 8), (0.2, 8)])
def test_batch(objects, expected):
    assert rules.batch_size(2, objects)[0] == expected


def test_percentiles_stay_within_the_objects():
    assert rules.upper_percentile(np.array([0.012, 0.05, 0.1]), (1.0, 99.8))[0] == [1, 99.8]
    # A tenth of the volumes hold 0.1 %: a quarter of it is 0.025 %.
    assert rules.upper_percentile(np.array([0.001] * 9), (1.0, 99.8))[0] == [1, 99.98]
    assert rules.upper_percentile(np.array([0.0, 0.0004, 0.0004]), (0.5, 99.8))[0] == [0.5, 99.99]
    assert rules.upper_percentile(np.array([1e-9]), (1.0, 99.8))[0] == [1, 99.999]
