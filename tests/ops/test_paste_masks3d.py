"""Pasted masks: by hand, against SciPy, round trips and symmetries."""

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from seg3d_monai.ops import mask_targets3d, paste_masks3d

pytestmark = pytest.mark.usefixtures("kernels")

SIZE = (9, 17, 26)


def ellipsoid(centre=(4, 8, 12), radius=(3.2, 5.4, 8.3)):
    grid = np.indices(SIZE)
    return torch.from_numpy(sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radius, strict=True)) <= 1)


def extent(mask):
    where = mask.nonzero()
    return torch.cat([where.amin(0), where.amax(0) + 1]).float()


def paste_mask(logits, box, threshold=0.5):
    """The mask of one detection, whose region is checked."""
    rois, (mask,) = paste_masks3d([logits], box[None], threshold)
    assert rois.tolist() == [[*box[:3].floor().long().tolist(), *box[3:].ceil().long().tolist()]]
    return mask


def crop(mask, box):
    z1, y1, x1 = box[:3].floor().long().tolist()
    z2, y2, x2 = box[3:].ceil().long().tolist()
    return mask[z1:z2, y1:y2, x1:x2]


def oracle(logits, box, threshold):
    lower, upper = np.floor(box[:3]).astype(int), np.ceil(box[3:]).astype(int)
    positions, inside = [], []
    for a in range(3):
        centre = np.arange(lower[a], upper[a]) + 0.5
        position = (centre - box[a]) / (box[a + 3] - box[a]) * logits.shape[a] - 0.5
        positions.append(np.clip(position, 0, logits.shape[a] - 1))
        inside.append((centre >= box[a]) & (centre < box[a + 3]))
    value = map_coordinates(logits, np.stack(np.meshgrid(*positions, indexing="ij")), order=1, mode="nearest")
    z, y, x = np.meshgrid(*inside, indexing="ij")
    return value, np.log(threshold / (1 - threshold)), z & y & x


@pytest.mark.parametrize("shape", [(4, 6, 10), (1, 1, 1), (3, 14, 5)])
@pytest.mark.parametrize("threshold", [0.5, 0.2, 0.9])
def test_equals_trilinear_interpolation_at_voxel_centres(shape, threshold):
    generator = np.random.default_rng(0)
    for _ in range(20):
        size = generator.uniform(0.1, 1, 3) * SIZE
        lower = generator.uniform(0, 1, 3) * (SIZE - size)
        box = np.float32([*lower, *(lower + size)])
        logits = generator.normal(size=shape).astype(np.float32)
        value, cut, inside = oracle(logits.astype(np.float64), box.astype(np.float64), threshold)
        found = paste_mask(torch.from_numpy(logits), torch.from_numpy(box), threshold).numpy()
        assert found.dtype == bool
        assert found.shape == value.shape
        clear = np.abs(value - cut) > 1e-4
        assert np.array_equal(found[clear], (inside & (value > cut))[clear])


def test_the_grid_of_the_truth_gives_back_the_object():
    mask = ellipsoid()
    box = extent(mask)
    size = [int(v) for v in box[3:] - box[:3]]
    occupancy, _ = mask_targets3d(mask.long(), torch.tensor([1]), box[None], size)
    assert torch.equal(paste_mask(torch.logit(occupancy[0], eps=1e-3), box), crop(mask, box))


@pytest.mark.parametrize(("grid", "least"), [((14, 22, 34), 0.97), ((12, 14, 14), 0.85), ((8, 8, 8), 0.75)])
@pytest.mark.parametrize("grow", [0.0, 0.4, 1.3])
def test_other_grids_give_back_nearly_the_object(grid, least, grow):
    mask = ellipsoid()
    box = extent(mask) + torch.tensor([-grow, -grow, -grow, grow, grow, grow])
    box = torch.minimum(box.clamp(min=0), torch.tensor([*SIZE, *SIZE]))
    occupancy, _ = mask_targets3d(mask.long(), torch.tensor([1]), box[None], grid)
    found, truth = paste_mask(torch.logit(occupancy[0], eps=1e-3), box), crop(mask, box)
    assert (found & truth).sum() / (found | truth).sum() > least


def test_touching_objects_are_given_back_apart():
    first = ellipsoid((4, 8, 8), (3.2, 5.4, 5.3))
    second = ellipsoid((4, 8, 17), (3.2, 5.4, 5.3)) & ~first
    label = first.long() + 2 * second.long()
    for number, mask in ((1, first), (2, second)):
        box = extent(mask)
        size = [int(v) for v in box[3:] - box[:3]]
        occupancy, _ = mask_targets3d(label, torch.tensor([number]), box[None], size)
        assert torch.equal(paste_mask(torch.logit(occupancy[0], eps=1e-3), box), crop(mask, box))


def test_by_hand_in_one_dimension():
    # Bins over x 2..10 are centred at 3, 5, 7, 9 with logits -1, 1, 1, -3; voxel centres 2.5, 3.5, ... 9.5.
    logits = torch.tensor([-1.0, 1.0, 1.0, -3.0]).reshape(1, 1, 4)
    found = paste_mask(logits, torch.tensor([0.0, 0, 2, 1, 1, 10]))
    # Values: -1, -0.5, 0.5, 1, 1, 0, -2, -3; what equals the threshold is not above it.
    assert found.flatten().tolist() == [False, False, True, True, True, False, False, False]


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (1.0, 4.0, [1, 1, 1]),
        (1.5, 4.0, [1, 1, 1]),  # the centre of voxel 1 is the first point of the box
        (1.6, 4.0, [0, 1, 1]),
        (1.4, 3.4, [1, 1, 0]),
        (1.4, 3.6, [1, 1, 1]),
        (1.4, 3.5, [1, 1, 0]),  # half-open: the centre of voxel 3 is outside
        (1.6, 2.4, [0, 0]),
    ],
)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_fractional_corners_cover_floor_to_ceil_and_fill_voxels_whose_centre_is_inside(low, high, wanted, axis):
    box = torch.tensor([3.0, 3, 3, 5, 5, 5])
    box[axis], box[axis + 3] = low, high
    found = paste_mask(torch.ones(2, 3, 4), box)
    shape = [2, 2, 2]
    shape[axis] = len(wanted)
    assert list(found.shape) == shape
    assert found.movedim(axis, 0).flatten(1).all(1).int().tolist() == wanted
    assert found.movedim(axis, 0).flatten(1).any(1).int().tolist() == wanted


def test_boxes_that_touch_share_no_voxel():
    first = paste_mask(torch.ones(2, 2, 2), torch.tensor([0.0, 0, 0, 2, 3, 4.5]))
    second = paste_mask(torch.ones(2, 2, 2), torch.tensor([0.0, 0, 4.5, 2, 3, 9]))
    assert not (first[..., 4] & second[..., 0]).any()


@pytest.mark.parametrize("offset", [(1, 2, 3), (100, 0, 40)])
def test_moving_a_box_by_voxels_moves_its_mask(offset):
    torch.manual_seed(0)
    logits, box = torch.randn(3, 5, 7), torch.tensor([0.3, 1.2, 2.1, 6.6, 11.5, 20.4], dtype=torch.float64)
    moved = box + torch.tensor([*offset, *offset])
    assert torch.equal(paste_mask(logits, moved), paste_mask(logits, box))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_flipping_logits_and_box_flips_the_mask(axis):
    torch.manual_seed(0)
    logits, box = torch.randn(3, 5, 7), torch.tensor([0.3, 1.2, 2.1, 6.6, 11.6, 20.4], dtype=torch.float64)
    flipped = box.clone()
    flipped[axis], flipped[axis + 3] = SIZE[axis] - box[axis + 3], SIZE[axis] - box[axis]
    assert torch.equal(paste_mask(logits.flip(axis), flipped), paste_mask(logits, box).flip(axis))


def test_permuting_axes_permutes_the_mask():
    torch.manual_seed(0)
    logits, box = torch.randn(3, 5, 7), torch.tensor([0.3, 1.2, 2.1, 6.6, 11.6, 20.4])
    found = paste_mask(logits.permute(2, 0, 1), box[[2, 0, 1, 5, 3, 4]])
    assert torch.equal(found, paste_mask(logits, box).permute(2, 0, 1))


def test_half_precision_logits_are_placed_in_full_precision():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 7).bfloat16()
    box = torch.tensor([0.0, 1.0, 1000.0, 3.0, 41.0, 1500.0])
    assert torch.equal(paste_mask(logits, box), paste_mask(logits.float(), box))


def test_one_voxel():
    assert paste_mask(torch.ones(4, 4, 4), torch.tensor([2.0, 3, 4, 3, 4, 5])).tolist() == [[[True]]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_many_at_once_are_those_one_by_one(dtype):
    generator = torch.Generator().manual_seed(0)
    lower = torch.rand((40, 3), generator=generator) * 30 - 5
    boxes = torch.cat([lower, lower + torch.rand((40, 3), generator=generator) * torch.tensor([4.0, 9.0, 17.0])], 1)
    logits = torch.randn((40, 3, 5, 7), generator=generator, dtype=dtype)
    rois, masks = paste_masks3d(logits, boxes)
    assert rois.dtype == torch.int64
    assert sum(bool(mask.any()) for mask in masks) >= 30
    for grid, box, roi, mask in zip(logits, boxes, rois, masks, strict=True):
        alone, (found,) = paste_masks3d(grid[None], box[None])
        assert torch.equal(alone[0], roi)
        assert torch.equal(found, mask)
        assert [*mask.shape] == (roi[3:] - roi[:3]).tolist()
    sizes = [(1 + n % 3, 1 + n % 5, 1 + n % 7) for n in range(40)]
    grids = [grid[:d, :h, :w] for grid, (d, h, w) in zip(logits, sizes, strict=True)]
    _, masks = paste_masks3d(grids, boxes)
    for grid, box, mask in zip(grids, boxes, masks, strict=True):
        assert torch.equal(paste_mask(grid, box), mask)


def test_float64_grids_are_interpolated_in_float64():
    logits = torch.tensor([1e-9, -1e-9], dtype=torch.float64).reshape(1, 1, 2) + 1
    threshold = float(torch.sigmoid(torch.tensor(1.0, dtype=torch.float64)))
    box = torch.tensor([0.0, 0, 0, 1, 1, 4])
    assert paste_mask(logits, box, threshold).flatten().tolist() == [True, True, False, False]
    assert not paste_mask(logits.float(), box, threshold).any()


@pytest.mark.parametrize("logits", [[], torch.zeros(0, 3, 4, 5)])
def test_nothing(logits):
    rois, masks = paste_masks3d(logits, torch.zeros(0, 6))
    assert rois.shape == (0, 6)
    assert rois.dtype == torch.int64
    assert masks == []


def test_boxes_without_a_voxel_centre_have_empty_masks():
    flat = torch.tensor([[2.6, 3, 4, 3.4, 5, 6], [2, 3, 4, 2, 5, 6], [1.5, 3, 4, 1.5, 5, 6]])
    rois, masks = paste_masks3d(torch.ones(3, 2, 2, 2), flat)
    assert rois.tolist() == [[2, 3, 4, 4, 5, 6], [2, 3, 4, 2, 5, 6], [1, 3, 4, 2, 5, 6]]
    assert [tuple(mask.shape) for mask in masks] == [(2, 2, 2), (0, 2, 2), (1, 2, 2)]
    assert not any(mask.any() for mask in masks)


def test_the_operator_keeps_the_rules_of_operators():
    boxes = torch.tensor([[0.3, 1.2, 2.1, 6.6, 11.5, 20.4], [2.6, 3, 4, 3.4, 5, 6]], dtype=torch.float64)
    sizes = torch.tensor([[3, 5, 7], [1, 2, 1]])
    torch.library.opcheck(torch.ops.seg3d.paste_masks3d.default, (torch.randn(107), sizes, boxes, 0.1))
    with pytest.raises(RuntimeError):
        torch.ops.seg3d.paste_masks3d(torch.randn(106), sizes, boxes, 0.1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4, 5, dtype=torch.int64)}, TypeError, "logits must be float64 or float32"),
        ({"logits": torch.zeros(2, 3, 4)}, ValueError, r"logits must have the shape \[N, d, h, w\]"),
        ({"logits": [torch.zeros(3, 4, 5), torch.zeros(4, 5)]}, ValueError, "a grid of logits must have the shape"),
        ({"logits": torch.zeros(3, 3, 4, 5)}, ValueError, "one grid per box, got 3 for 2"),
        ({"logits": torch.zeros(2, 3, 0, 5)}, ValueError, "no bin on an axis"),
        (
            {"boxes": torch.tensor([[0.0, 0, 0, 1, 1, 1], [0, 0, 0, 1, torch.nan, 1]])},
            ValueError,
            r"boxes\[1\] = .*nan",
        ),
        ({"boxes": torch.tensor([[0.0, 0, 0, 1, -1, 1]] * 2)}, ValueError, r"boxes\[0\].*swapped"),
        ({"boxes": torch.zeros(2, 4)}, ValueError, "boxes must have the shape"),
        ({"threshold": 1.0}, ValueError, "threshold must be a probability"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    arguments = {"logits": torch.zeros(2, 3, 4, 5), "boxes": torch.tensor([[0.0, 0, 0, 2, 3, 4]] * 2), "threshold": 0.5}
    with pytest.raises(error, match=message):
        paste_masks3d(**(arguments | changes))
