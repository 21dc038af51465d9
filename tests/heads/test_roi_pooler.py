"""RoI pooler: level of a box by hand, the same rows as pooling each box alone, nothing at all."""

import pytest
import torch

from seg3d_monai.heads import RoIPooler
from seg3d_monai.ops import roi_align3d

STRIDES = {"p1": (1, 2, 2), "p2": (2, 4, 4), "p3": (4, 8, 8)}
SIZE = (17, 50, 70)


def make_features(channels=3, batch=2):
    generator = torch.Generator().manual_seed(0)
    return {
        level: torch.randn(
            batch, channels, *(-(-n // s) for n, s in zip(SIZE, stride, strict=True)), generator=generator
        )
        for level, stride in STRIDES.items()
    }


def random_boxes(count):
    generator = torch.Generator().manual_seed(1)
    size = torch.tensor(SIZE)
    extent = torch.rand(count, 3, generator=generator) ** 2 * size
    lower = torch.rand(count, 3, generator=generator) * (size - extent)
    return torch.cat([lower, lower + extent], 1), torch.randint(0, 2, (count,), generator=generator)


def test_level_is_the_coarsest_on_which_the_box_still_spans_enough_cells():
    pooler = RoIPooler(output_size=(2, 3, 4), strides=STRIDES, min_cells=5.0)
    # Cells on (p1, p2, p3) by geometric mean; a level halves them.
    extents = [
        ((4.0, 8, 8), 0),  # 4, 2, 1: fits nowhere, so the finest
        ((6, 12, 12), 0),  # 6, 3, 1.5
        ((9.9, 19.8, 19.8), 0),  # 9.9, 4.95
        ((10.2, 20.4, 20.4), 1),  # 10.2, 5.1
        ((40, 20, 10), 1),  # (40 * 10 * 5) ** (1/3) = 12.6, 6.3, 3.2
        ((20.4, 40.8, 40.8), 2),
        ((100, 200, 200), 2),
        ((0, 0, 0), 0),
    ]
    boxes = torch.tensor([[1.0, 2, 3, 1 + e[0], 2 + e[1], 3 + e[2]] for e, _ in extents])
    assert pooler.assign_levels(boxes).tolist() == [level for _, level in extents]


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_rows_equal_pooling_each_box_alone_from_its_level(sampling_ratio):
    features = make_features()
    boxes, batch = random_boxes(40)
    pooler = RoIPooler(output_size=(2, 3, 4), strides=STRIDES, sampling_ratio=sampling_ratio, min_cells=3.0)
    levels = pooler.assign_levels(boxes)
    assert levels.unique().tolist() == [0, 1, 2]
    found = pooler(features, boxes, batch)
    assert found.shape == (40, 3, 2, 3, 4)
    for row in range(40):
        name, stride = list(STRIDES.items())[levels[row]]
        scale = tuple(1 / s for s in stride)
        alone = roi_align3d(
            features[name], boxes[row : row + 1], batch[row : row + 1], (2, 3, 4), scale, sampling_ratio
        )
        torch.testing.assert_close(found[row : row + 1], alone)


def test_gradients_are_those_of_pooling_each_box_alone():
    boxes, batch = random_boxes(40)
    pooler = RoIPooler(output_size=(2, 3, 4), strides=STRIDES, min_cells=3.0)
    whole, parts = ({k: v.double().requires_grad_() for k, v in make_features().items()} for _ in range(2))
    weight = torch.randn(40, 3, 2, 3, 4, generator=torch.Generator().manual_seed(2)).double()
    (pooler(whole, boxes, batch) * weight).sum().backward()
    for row in range(40):
        (pooler(parts, boxes[row : row + 1], batch[row : row + 1]) * weight[row]).sum().backward()
    for level in STRIDES:
        assert whole[level].grad.any()
        torch.testing.assert_close(whole[level].grad, parts[level].grad)


def test_one_level_takes_every_box():
    features = make_features()
    boxes, batch = random_boxes(7)
    found = RoIPooler(output_size=(2, 3, 4), strides={"p2": STRIDES["p2"]})(features, boxes, batch)
    torch.testing.assert_close(found, roi_align3d(features["p2"], boxes, batch, (2, 3, 4), (0.5, 0.25, 0.25), 2))


def test_position_is_pooled_from_the_right_place_on_every_level():
    """Features that hold the voxel position of their cell: each bin holds its own centre."""
    maps = {}
    for level, stride in STRIDES.items():
        axes = [(torch.arange(-(-n // s)) + 0.5) * s for n, s in zip(SIZE, stride, strict=True)]
        maps[level] = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]
    boxes = torch.tensor([[5.0, 10, 20, 8, 16, 27], [2.5, 5, 11, 14.5, 41, 59], [3, 6, 9, 9.5, 27, 31]])
    found = RoIPooler(output_size=(2, 3, 4), strides=STRIDES, min_cells=2.0)(maps, boxes, torch.zeros(3).long())
    for axis, bins in enumerate((2, 3, 4)):
        centre = (torch.arange(bins) + 0.5) / bins
        wanted = boxes[:, axis, None] + (boxes[:, axis + 3] - boxes[:, axis])[:, None] * centre
        shape = [3, 1, 1, 1]
        shape[axis + 1] = bins
        torch.testing.assert_close(found[:, axis], wanted.reshape(shape).expand(3, 2, 3, 4), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("levels", [["p1", "p2", "p3"], ["p1"]])
def test_zero_boxes_stay_attached_to_every_level(levels):
    features = {level: feature.requires_grad_() for level, feature in make_features().items()}
    pooler = RoIPooler(output_size=(2, 3, 4), strides={level: STRIDES[level] for level in levels})
    found = pooler(features, torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))
    assert found.shape == (0, 3, 2, 3, 4)
    found.sum().backward()
    assert all(not features[level].grad.any() for level in levels)


def test_output_size_needs_three_axes():
    with pytest.raises(ValueError, match="output_size"):
        RoIPooler(output_size=(7, 7), strides=STRIDES)
