"""Anchors: positions counted by hand at odd sizes, extents as asked for, user errors."""

import pytest
import torch

from seg3d_monai.heads import AnchorGrid


def features(**sizes):
    return {level: torch.zeros(2, 3, *size) for level, size in sizes.items()}


def test_anchors_of_a_toy_by_hand():
    grid = AnchorGrid(shapes=[[(2, 4, 6), (4, 4, 4)]], strides={"p1": (1, 2, 4)})
    (anchors,) = grid(features(p1=(2, 1, 2)))
    # Cell (z, y, x) is centred at ((z + 0.5) * 1, (y + 0.5) * 2, (x + 0.5) * 4).
    wanted = [
        [-0.5, -1, -1, 1.5, 3, 5],
        [-1.5, -1, 0, 2.5, 3, 4],
        [-0.5, -1, 3, 1.5, 3, 9],
        [-1.5, -1, 4, 2.5, 3, 8],
        [0.5, -1, -1, 2.5, 3, 5],
        [-0.5, -1, 0, 3.5, 3, 4],
        [0.5, -1, 3, 2.5, 3, 9],
        [-0.5, -1, 4, 3.5, 3, 8],
    ]
    assert anchors.dtype == torch.float32
    assert anchors.tolist() == wanted


def test_every_level_has_its_own_stride_shapes_and_odd_size():
    shapes = [[(2, 4, 6)], [(6, 8, 10)]]
    strides = {"p1": (1, 2, 3), "p2": (2, 4, 9)}
    sizes = {"p1": (5, 7, 3), "p2": (3, 4, 1)}
    for level, shape, anchors in zip(
        strides, shapes, AnchorGrid(shapes=shapes, strides=strides)(features(**sizes)), strict=True
    ):
        cells = torch.cartesian_prod(*(torch.arange(n) for n in sizes[level])).float()
        centre = (cells + 0.5) * torch.tensor(strides[level])
        half = torch.tensor(shape[0]) / 2
        torch.testing.assert_close(anchors, torch.cat([centre - half, centre + half], 1))


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 9, 13), (2.5, 6.0, 10.5)])
def test_extents_are_exactly_those_asked_for(shape):
    (anchors,) = AnchorGrid(shapes=[[shape]], strides={"p1": (1, 2, 4)})(features(p1=(1, 2, 3)))
    assert (anchors[:, 3:] - anchors[:, :3]).tolist() == [list(shape)] * 6


def test_order_of_levels_is_that_of_the_strides_not_of_the_features():
    grid = AnchorGrid(shapes=[[(2, 2, 2)], [(4, 4, 4)]], strides={"p1": (1, 1, 1), "p2": (2, 2, 2)})
    first, second = grid(features(p3=(9, 9, 9), p2=(1, 2, 1), p1=(1, 3, 2)))
    assert (len(first), len(second)) == (6, 2)


def test_anchors_do_not_depend_on_an_earlier_call():
    grid = AnchorGrid(shapes=[[(2, 4, 6)]], strides={"p1": (1, 2, 4)})
    before = grid(features(p1=(2, 3, 5)))[0]
    grid(features(p1=(7, 1, 4)))
    assert torch.equal(grid(features(p1=(2, 3, 5)))[0], before)


def test_half_precision_features_still_give_float32_anchors():
    grid = AnchorGrid(shapes=[[(2, 4, 6)]], strides={"p1": (1, 2, 4)})
    assert grid({"p1": torch.zeros(1, 1, 1, 1, 300, dtype=torch.bfloat16)})[0][-1].tolist()[2::3] == [1195.0, 1201.0]


def test_a_network_in_half_precision_keeps_its_anchors_in_float32():
    grid = AnchorGrid(shapes=[[(2, 4, 6)]], strides={"p1": (1, 2, 4)}).bfloat16()
    (anchors,) = grid({"p1": torch.zeros(1, 1, 1, 1, 300, dtype=torch.bfloat16)})
    assert anchors.dtype == torch.float32
    assert anchors[-1].tolist() == [-0.5, -1, 1195, 1.5, 3, 1201]


@pytest.mark.parametrize(
    "shapes", [[[(2, 2, 2)]], [[(2, 2, 2)], [(2, 2, 2), (4, 4, 4)]], [[(2, 2, 2)], [(0, 2, 2)]], [[(2, 2)], [(2, 2)]]]
)
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match="anchor shapes"):
        AnchorGrid(shapes=shapes, strides={"p1": (1, 1, 1), "p2": (2, 2, 2)})
