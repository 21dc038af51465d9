"""Anchors fit boxes: IoUs by hand, clusters against an exhaustive search."""

from itertools import product

import numpy as np
import pytest

from seg3d_monai.planning.anchors import cluster_shapes, mean_best_iou, shape_iou


def test_iou_of_shapes_by_hand():
    iou = shape_iou([[2, 4, 4], [4, 4, 4]], [[4, 4, 4], [2, 8, 2], [1, 1, 1]])
    np.testing.assert_allclose(iou, [[32 / 64, 16 / (32 + 32 - 16), 1 / 32], [1, 16 / (64 + 32 - 16), 1 / 64]])
    assert mean_best_iou([[2, 4, 4], [4, 4, 4]], [[4, 4, 4], [1, 1, 1]]) == 0.75


def test_two_kinds_of_cells_get_an_anchor_each():
    rng = np.random.default_rng(0)
    flat, tall = [4, 20, 20] + rng.normal(0, 0.5, (50, 3)), [24, 8, 8] + rng.normal(0, 0.5, (50, 3))
    found = cluster_shapes(np.concatenate([flat, tall]), 2)
    np.testing.assert_allclose(found, [[24, 8, 8], [4, 20, 20]], atol=0.5)  # by volume: 1536, 1600


def test_no_partition_does_better():
    shapes = np.array([[3, 8, 8], [4, 9, 8], [4, 12, 11], [6, 12, 14], [9, 20, 18], [10, 24, 25], [6, 6, 6]], float)
    best = 0.0
    for parts in product([0, 1], repeat=len(shapes)):
        part = np.array(parts)
        if 0 < part.sum() < len(shapes):
            best = max(best, mean_best_iou(shapes, [np.median(shapes[part == k], axis=0) for k in (0, 1)]))
    assert mean_best_iou(shapes, cluster_shapes(shapes, 2)) >= best - 1e-9


def test_one_object_and_fewer_shapes_than_anchors():
    found = cluster_shapes([[4, 10, 8]], 4)
    assert found.shape == (4, 3)
    np.testing.assert_allclose(found[2], [4, 10, 8])
    np.testing.assert_allclose(found[3], [5, 12.5, 10])
    np.testing.assert_allclose(found[1], [3.2, 8, 6.4])
    again = cluster_shapes([[4, 10, 8]] * 9 + [[8, 20, 16]], 2)
    np.testing.assert_allclose(again, [[4, 10, 8], [8, 20, 16]])


def test_very_many_are_sampled_and_the_same_each_time():
    shapes = np.random.default_rng(1).uniform(2, 40, (30_000, 3))
    found = cluster_shapes(shapes, 6)
    np.testing.assert_array_equal(found, cluster_shapes(shapes, 6))
    assert (np.diff(found.prod(axis=1)) > 0).all()
    assert mean_best_iou(shapes, found) > 0.4


@pytest.mark.parametrize("shapes", [np.zeros((0, 3)), [[0, 4, 4]]])
def test_refuses_what_has_no_volume(shapes):
    with pytest.raises(ValueError, match="three positive extents"):
        cluster_shapes(shapes, 2)
