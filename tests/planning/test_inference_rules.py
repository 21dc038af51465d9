"""Halo and blocks on examples that are worked out by hand."""

from math import prod

import pytest

from seg3d_monai.planning import inference_rules as rules

STRIDES = (8, 16, 16)


@pytest.mark.parametrize(
    ("large", "expected"), [((21, 25, 23), (24, 32, 32)), ((24, 32, 33), (24, 32, 48)), ((1, 1, 1), (8, 16, 16))]
)
def test_a_halo_is_as_long_as_a_large_object(large, expected):
    assert rules.halo(large, STRIDES)[0] == expected


def grown(halo, crop, most_voxels):
    return rules.block_size(halo, crop, STRIDES, lambda read: prod(read) <= most_voxels, lambda _: 2**30, "full")


def test_a_block_grows_until_its_halo_is_cheap():
    block, reason = grown((8, 16, 16), (48, 80, 80), 1e12)
    assert all(n % s == 0 for n, s in zip(block, STRIDES, strict=True))
    assert rules.overhead(block, (8, 16, 16)) <= rules.MOST_OVERHEAD
    for axis in range(3):  # and no further than that
        less = [n - s * (a == axis) for a, (n, s) in enumerate(zip(block, STRIDES, strict=True))]
        assert min(less) == 0 or rules.overhead(less, (8, 16, 16)) > rules.MOST_OVERHEAD * 0.9
    assert "1 GiB" in reason


def test_memory_ends_the_growth():
    block, _ = grown((8, 16, 16), (48, 80, 80), 64 * 96 * 96)
    assert prod(n + 2 * h for n, h in zip(block, (8, 16, 16), strict=True)) <= 64 * 96 * 96
    assert rules.overhead(block, (8, 16, 16)) > rules.MOST_OVERHEAD


def test_with_little_memory_a_block_reads_less_than_a_crop_and_at_worst_owns_one_stride():
    assert grown((8, 16, 16), (96, 160, 160), 64 * 96 * 96)[0] != (80, 128, 128)
    assert grown((8, 16, 16), (96, 160, 160), 1)[0] == STRIDES


def test_overhead_by_hand():
    assert rules.overhead((16, 32, 64), (8, 16, 0)) == 4
