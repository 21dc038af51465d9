"""The plan of blocks, counted by hand."""

import numpy as np
import pytest

from seg3d_monai.inference.blocks import BlockPlan, intersection, roi_shape, roi_slices

ROI = (0, 0, 0, 900, 2000, 40)  # one block along x, which needs no halo


def test_one_dimension_by_hand():
    plan = BlockPlan.make(shape=(1, 1, 10), block_size=(1, 1, 4), halo=(0, 0, 2))
    assert plan.grid == (1, 1, 3)
    assert [b.owned[2::3] for b in plan] == [(0, 4), (4, 8), (8, 10)]
    assert [b.read[2::3] for b in plan] == [(0, 6), (2, 10), (6, 10)]
    # read 0 = [0, 6) and read 2 = [6, 10) share nothing
    assert [plan.neighbours(i) for i in range(3)] == [[1], [0, 2], [1]]


def test_halo_of_more_than_half_a_block_reaches_further():
    plan = BlockPlan.make(shape=(1, 1, 16), block_size=4, halo=(0, 0, 3))
    assert [b.read[2::3] for b in plan] == [(0, 7), (1, 11), (5, 15), (9, 16)]
    assert plan.neighbours(0) == [1, 2]
    assert plan.neighbours(1) == [0, 2, 3]


def test_index_is_raster_order_and_ends_are_clipped():
    plan = BlockPlan.make(shape=(5, 7, 4), block_size=(3, 4, 4), halo=1)
    assert plan.grid == (2, 2, 1)
    assert len(plan) == 4
    block = plan[3]
    assert block.index == 3
    assert block.position == (1, 1, 0)
    assert block.owned == (3, 4, 0, 5, 7, 4)
    assert block.read == (2, 3, 0, 5, 7, 4)
    assert plan.neighbours(0) == [1, 2, 3]


@pytest.mark.parametrize(
    ("step", "block_size", "halo"),
    [
        ((1, 1, 1), (64, 192, 191), (8, 24, 0)),
        ((1, 2, 0.5), (64, 384, 96), (8, 50, 0)),
        ((2.5, 3.84375, 0.3), (160, 768, 56), (23, 97, 0)),  # 738 becomes 768, six times 128; 57.3 becomes 56
        ((0.01, 1.02, 40), (1, 192, 7168), (2, 27, 0)),  # never no voxel at all
    ],
)
def test_sizes_may_be_given_in_the_voxels_of_a_model(step, block_size, halo):
    plan = BlockPlan.make(shape=(900, 2000, 9000), block_size=(64, 192, 191), halo=(8, 24, 0), step=step, roi=ROI)
    assert (plan.block_size, plan.halo) == (block_size, halo)


@pytest.mark.parametrize("block_size", [(3, 2, 6), (5, 7, 4), (1, 3, 2), (100, 4, 3)])
def test_owned_rois_tile_the_volume(block_size):
    plan = BlockPlan.make(shape=(5, 7, 6), block_size=block_size, halo=(1, 2, 3))
    times = np.zeros(plan.shape, int)
    for block in plan:
        times[roi_slices(block.owned)] += 1
        assert intersection(block.owned, block.read) == block.owned
    assert (times == 1).all()


def test_neighbours_and_owners_match_a_naive_search():
    plan = BlockPlan.make(shape=(9, 14, 5), block_size=(2, 5, 3), halo=(2, 1, 4))
    for block in plan:
        near = [b.index for b in plan if b is not block and intersection(b.read, block.read)]
        assert plan.neighbours(block.index) == [i for i in near if i != block.index]
        assert plan.owners(block) == [b.index for b in plan if intersection(b.owned, block.read)]


def test_volume_smaller_than_a_block_is_one_block_and_needs_no_halo():
    plan = BlockPlan.make(shape=(3, 4, 5), block_size=64, halo=0)
    assert len(plan) == 1
    assert plan[0].owned == plan[0].read == (0, 0, 0, 3, 4, 5)
    assert plan.neighbours(0) == []


def test_zero_halo_between_blocks_is_refused():
    with pytest.raises(ValueError, match="halo is 0 along y"):
        BlockPlan.make(shape=(4, 9, 4), block_size=(4, 3, 4), halo=(0, 0, 2))


@pytest.mark.parametrize(
    ("argument", "value", "kind"),
    [
        ("block_size", 0, ValueError),
        ("block_size", (4, 4), ValueError),
        ("block_size", (4, 4, 2.5), TypeError),
        ("halo", -1, ValueError),
        ("halo", (1, True, 1), TypeError),
        ("shape", (0, 4, 4), ValueError),
    ],
)
def test_bad_numbers_are_refused(argument, value, kind):
    arguments = {"shape": (8, 8, 8), "block_size": 4, "halo": 1} | {argument: value}
    with pytest.raises(kind, match=argument):
        BlockPlan.make(**arguments)


def test_roi_arithmetic():
    assert intersection((0, 0, 0, 4, 5, 6), (2, 5, 1, 6, 9, 7)) is None
    assert intersection((0, 0, 0, 4, 5, 6), (2, 4, 1, 6, 9, 7)) == (2, 4, 1, 4, 5, 6)
    assert roi_shape((1, 2, 3, 5, 9, 4)) == (4, 7, 1)
    assert roi_slices((1, 2, 3, 5, 9, 4), (1, 1, 1)) == (slice(0, 4), slice(1, 8), slice(2, 3))
