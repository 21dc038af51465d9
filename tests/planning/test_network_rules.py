"""Each rule for the network on examples that are worked out by hand."""

import numpy as np
import pytest

from seg3d_monai.planning import network_rules as rules

LEVELS = {"p1": (1, 2, 2), "p2": (2, 4, 4), "p3": (4, 8, 8), "p4": (8, 16, 16)}
ALL = (2, 2, 2)


@pytest.mark.parametrize(
    ("median", "stem", "stages"),
    [
        ((14, 18, 17), (1, 2, 2), [(1, 1, 1), ALL, ALL, ALL]),
        ((18, 18, 18), ALL, [(1, 1, 1), ALL, ALL, ALL]),
        ((8, 10, 10), (1, 1, 1), [(1, 1, 1), ALL, ALL, ALL]),
        ((40, 80, 80), ALL, [ALL, ALL, ALL, ALL]),
        # 3 planes against 20 pixels, 10 cells after the stem: z waits until y and x are down to 5 cells.
        ((3, 20, 20), (1, 2, 2), [(1, 1, 1), (1, 2, 2), ALL, ALL]),
        ((1, 40, 40), (1, 2, 2), [(1, 2, 2), (1, 2, 2), (1, 2, 2), (1, 2, 2)]),
    ],
)
def test_strides(median, stem, stages):
    (found_stem, found_stages), reason = rules.strides(median, 4)
    assert found_stem == stem
    assert found_stages == stages
    assert "8 or more cells" in reason


@pytest.mark.parametrize(
    ("num_levels", "small", "large", "expected"),
    [
        (2, (7, 8, 8), (21, 25, 23), ["p2", "p3"]),
        (3, (7, 8, 8), (21, 25, 23), ["p1", "p2", "p3"]),  # p4 would leave a cell and a half of a large object
        (2, (3, 5, 5), (6, 9, 9), ["p1", "p2"]),
        (2, (40, 60, 60), (60, 90, 90), ["p3", "p4"]),
        (1, (40, 60, 60), (60, 90, 90), ["p4"]),
        (9, (7, 8, 8), (21, 25, 23), ["p1", "p2", "p3", "p4"]),
        (1, (1, 1, 1), (1, 1, 1), ["p1"]),
    ],
)
def test_anchor_levels(num_levels, small, large, expected):
    assert rules.anchor_levels(LEVELS, num_levels, small, large)[0] == expected


def test_anchor_shapes_are_dealt_out_by_size_and_said_to_fit_better():
    extents = np.array([[4, 8, 8], [6, 12, 12], [10, 20, 20], [14, 28, 28]] * 5, float)
    default = [[[6, 14, 14], [12, 16, 16]], [[16, 24, 24], [22, 32, 32]]]
    shapes, reason = rules.anchor_shapes(extents, default, 2)
    assert shapes == [[[4, 8, 8], [6, 12, 12]], [[10, 20, 20], [14, 28, 28]]]
    assert "IoU of 1.00 on average" in reason
    # The best of the bundle's: 6 x 14 x 14 for the small two; 12 x 16 x 16, that has 10 * 16 * 16 voxels in common with
    # the third, whose IoU with 16 x 24 x 24 is 4000 / 9216; and that one for the last.
    third = 2560 / (4000 + 3072 - 2560)
    expected = np.mean([256 / 1176, 864 / 1176, third, 8064 / (10976 + 9216 - 8064)])
    assert f"with the bundle's {expected:.2f}" in reason


def test_one_object_gives_as_many_anchors():
    shapes, _ = rules.anchor_shapes(np.array([[5.0, 12.0, 13.0]]), [[[1, 1, 1]] * 3] * 2, 2)
    assert np.array(shapes).shape == (2, 3, 3)
    assert [5.0, 12.0, 13.0] in np.array(shapes).reshape(-1, 3).tolist()


@pytest.mark.parametrize(
    ("typical", "expected"), [((16, 20, 19), (8, 10, 10)), ((1, 5, 80), (4, 4, 14)), ((22, 26, 30), (12, 14, 14))]
)
def test_mask_roi_size(typical, expected):
    assert rules.mask_roi_size(typical)[0] == expected


@pytest.mark.parametrize(("crowded", "expected"), [(0, 100), (24, 100), (25, 150), (43, 200), (700, 3500)])
def test_num_queries(crowded, expected):
    assert rules.num_queries(crowded)[0] == expected


def test_limits_grow_with_the_objects_and_never_fall():
    # A nucleus in 1000 voxels: 5000 in 5 million.
    assert rules.most_detections(1e-3, 2000)[0] == 10_000
    assert rules.most_detections(1e-5, 2000)[0] == 2000
    assert rules.kept_boxes("anchors", 90, 1e-3, (1000, 20000))[0] == (1800, 100_000)
    assert rules.kept_boxes("proposals", 90, 1e-3, (500, 5000))[0] == (500, 25_000)
    assert rules.kept_boxes("proposals", 0, 0, (500, 5000))[0] == (500, 5000)


@pytest.mark.parametrize(("crowded", "expected"), [(0, 128), (64, 128), (65, 192), (128, 256), (10_000, 512)])
def test_num_samples(crowded, expected):
    assert rules.num_samples(crowded, 128)[0] == expected
    assert rules.num_samples(crowded, 600)[0] == 600
