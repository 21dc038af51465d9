"""Halo and blocks on examples that are worked out by hand."""

from math import prod

import pytest

from seg3d_monai.planning import inference_rules as rules

STRIDES = (8, 16, 16)


@pytest.mark.parametrize(
    ("large", "expected"), [((21, 25, 23.2), (24, 28, 24)), ((24, 32, 33), (24, 32, 36)), ((1, 0.5, 4), (4, 4, 4))]
)
def test_a_halo_is_as_long_as_a_large_object(large, expected):
    assert rules.halo(large)[0] == expected


def blocks_of(most_voxels, crop=(48, 80, 80), halo=(8, 16, 16)):
    return rules.block_size(crop, halo, STRIDES, lambda read: prod(read) <= most_voxels, "memory is full")


def test_a_block_owns_a_crop():
    block, reason = blocks_of(1e9)
    assert block == (48, 80, 80)
    assert "as much as a crop holds" in reason
    assert f"reads {64 * 112 * 112 / (48 * 80 * 80):.2f} voxels" in reason


def test_less_where_that_does_not_fit():
    # (48, 80, 80) reads 64 * 112 * 112; z has six strides, y and x five: z goes first, then all have five.
    assert blocks_of(64 * 112 * 112 - 1)[0] == (40, 80, 80)
    assert blocks_of(56 * 112 * 112 - 1)[0] == (32, 80, 80)
    assert blocks_of(48 * 112 * 112 - 1)[0] == (32, 64, 80)
    assert "less than a crop holds, since memory is full" in blocks_of(56 * 112 * 112 - 1)[1]


def test_a_block_is_large_where_norms_do_not_mind():
    def blocks(most_voxels):
        return rules.block_size(
            (48, 80, 80), (8, 16, 16), STRIDES, lambda read: prod(read) <= most_voxels, "memory is full", (32, 192, 96)
        )

    block, reason = blocks(1e9)
    assert block == (48, 192, 96)
    assert reason.startswith("large: the network's norms do not depend")
    # (48, 192, 96) reads 64 * 224 * 128; y has twelve strides and the others six.
    assert blocks(64 * 224 * 128 - 1)[0] == (48, 176, 96)
    assert "as large as possible, since memory is full" in blocks(64 * 224 * 128 - 1)[1]
    assert blocks(0)[0] == STRIDES


def test_a_stride_is_the_least_that_a_block_owns():
    assert blocks_of(0)[0] == STRIDES
    assert blocks_of(0, crop=(1, 64, 64))[0] == (1, 16, 16)


def test_what_is_read_by_hand():
    assert rules.read_size((16, 32, 64), (8, 16, 0)) == (32, 64, 64)
    assert rules.overhead((16, 32, 64), (8, 16, 0)) == 4
