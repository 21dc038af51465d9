"""Objects of regions, where the numbers are known."""

import numpy as np
import pytest
from planning_toys import fingerprint_of, volume_facts

from seg3d_monai.planning.counts import NUM_REGIONS, objects_in_regions

ROW = [(2, 3, x, 4, 6, x + 4) for x in range(1, 50, 10)]  # five of (2, 3, 4), 10 apart along x
SHAPE = (8, 9, 60)


def print_of(boxes, **changes):
    return fingerprint_of(boxes, [volume_facts(shape=SHAPE, num_objects=len(boxes), **changes)])


def test_a_region_like_its_volume_shows_all():
    counts = objects_in_regions(print_of(ROW), SHAPE)
    assert counts.visible.tolist() == counts.whole.tolist() == [5] * NUM_REGIONS
    larger = objects_in_regions(print_of(ROW), (99, 99, 99))
    assert larger.visible.tolist() == [5] * NUM_REGIONS


def test_a_region_like_an_object_shows_it_alone():
    counts = objects_in_regions(print_of(ROW), (2, 3, 4))
    assert counts.visible.tolist() == counts.whole.tolist() == [1] * NUM_REGIONS


def test_a_region_that_reaches_the_next_shows_one_or_two():
    # It holds one of length 4 and begins up to 8 before it, evenly. The next object begins 6 beyond the end of that
    # one, and a tenth of it is 0.4: it is seen from the last 1.6 of these 8, and the one before from the first 1.6.
    # The first object lies at 1, so that the region begins within 1 of it and always sees the second.
    counts = objects_in_regions(print_of(ROW), (2, 3, 12))
    assert set(counts.visible.tolist()) == {1, 2}
    assert (counts.visible == 2).mean() == pytest.approx((1 + 3 * 0.4 + 0.2) / 5, abs=0.06)


def test_a_region_smaller_than_an_object_shows_a_part():
    counts = objects_in_regions(print_of([(1, 1, 1, 7, 8, 50)]), (6, 7, 10))
    assert counts.visible.tolist() == [1] * NUM_REGIONS
    assert counts.whole.tolist() == [0] * NUM_REGIONS


def test_at_another_voxel_size_regions_are_of_the_target():
    near = objects_in_regions(print_of(ROW, spacing_um=(2.0, 1.0, 0.5)), (2, 3, 20), (2.0, 1.0, 0.5))
    far = objects_in_regions(print_of(ROW, spacing_um=(2.0, 1.0, 0.5)), (2, 3, 10), (2.0, 1.0, 1.0))
    np.testing.assert_array_equal(near.visible, far.visible)


def test_crowded_volumes_come_more_often():
    volumes = [volume_facts("a", shape=SHAPE, num_objects=5), volume_facts("b", shape=SHAPE, num_objects=1)]
    boxes = [*ROW, (2, 3, 1, 4, 6, 5)]
    counts = objects_in_regions(fingerprint_of(boxes, volumes, [0] * 5 + [1]), SHAPE)
    assert (counts.visible == 5).mean() == pytest.approx(5 / 6, abs=0.07)
    assert set(counts.visible.tolist()) == {1, 5}


def test_regions_stay_in_the_part_that_was_read():
    # Of a longer volume the part from 100 on, where the five lie.
    boxes = [(z1, y1, x1 + 100, z2, y2, x2 + 100) for z1, y1, x1, z2, y2, x2 in ROW]
    facts = volume_facts(shape=(8, 9, 999), num_objects=80, num_read=5, part=(0, 0, 100, 8, 9, 160))
    counts = objects_in_regions(fingerprint_of(boxes, [facts]), (8, 9, 500))
    assert counts.visible.tolist() == [5] * NUM_REGIONS
    assert fingerprint_of(boxes, [facts]).densities()[0] == pytest.approx(5 / (8 * 9 * 60))


def test_volumes_without_objects_are_not_drawn():
    volumes = [volume_facts("a", shape=SHAPE, num_objects=0), volume_facts("b", shape=SHAPE, num_objects=5)]
    counts = objects_in_regions(fingerprint_of(ROW, volumes, [1] * 5), SHAPE)
    assert counts.visible.tolist() == [5] * NUM_REGIONS
