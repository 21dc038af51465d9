"""Mask targets against SciPy's float64 trilinear interpolation, and by hand."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from seg3d_monai.ops import mask_targets3d

pytestmark = pytest.mark.usefixtures("kernels")

SIZE = (7, 13, 22)


def make_label(ignore=True):
    generator = np.random.default_rng(0)
    z, y, x = np.indices(SIZE)
    label = np.zeros(SIZE, np.int64)
    for instance, centre in enumerate([(2, 3, 4), (3, 8, 10), (4, 6, 17)], start=1):
        radius = (2.2, 3.3, 4.4)
        inside = sum(((g - c) / r) ** 2 for g, c, r in zip((z, y, x), centre, radius, strict=True)) <= 1
        label[inside] = instance * 10
    if ignore:
        label[generator.random(SIZE) < 0.03] = -1
    return label


def sample(mask, box, bins, shift=(0.0, 0.0, 0.0)):
    """Trilinear interpolation of a mask at the bin centres of a box."""
    positions = []
    for a in range(3):
        centre = box[a] + (box[a + 3] - box[a]) * (np.arange(bins[a]) + 0.5) / bins[a] + shift[a]
        positions.append(np.clip(centre - 0.5, 0, mask.shape[a] - 1))
    grid = np.stack(np.meshgrid(*positions, indexing="ij"))
    return map_coordinates(mask.astype(np.float64), grid, order=1, mode="nearest")


@pytest.mark.parametrize("bins", [(4, 6, 10), (1, 1, 1), (3, 14, 5)])
@pytest.mark.parametrize("ignore", [False, True])
def test_equals_trilinear_interpolation_of_the_instance(bins, ignore):
    label = make_label(ignore)
    generator = np.random.default_rng(1)
    boxes, ids = [], []
    for _ in range(30):
        extent = generator.uniform(0.3, 1, 3) * SIZE
        lower = generator.uniform(0, 1, 3) * (SIZE - extent)
        boxes.append([*lower, *(lower + extent)])
        ids.append(int(generator.choice([10, 20, 30])))
    boxes.append([0.0, 0, 0, *SIZE])
    ids.append(20)
    occupancy, valid = mask_targets3d(torch.from_numpy(label), torch.tensor(ids), torch.tensor(boxes).float(), bins)
    assert occupancy.dtype == torch.float32
    for row, (instance, box) in enumerate(zip(ids, boxes, strict=True)):
        box = np.float32(box).astype(np.float64)
        np.testing.assert_allclose(occupancy[row].numpy(), sample(label == instance, box, bins), atol=2e-5)
        # A bin is not valid where an ignored voxel has a real share, and valid where none is within a rounding error.
        shares = [sample(label == -1, box, bins, shift) for shift in product((-1e-4, 0, 1e-4), repeat=3)]
        assert not valid[row].numpy()[np.min(shares, 0) > 0].any()
        assert valid[row].numpy()[np.max(shares, 0) == 0].all()


def test_bins_of_one_voxel_read_the_label_itself():
    label = make_label()
    box = torch.tensor([[1.0, 2, 3, 6, 11, 20]])
    occupancy, valid = mask_targets3d(torch.from_numpy(label), torch.tensor([20]), box, (5, 9, 17))
    crop = label[1:6, 2:11, 3:20]
    assert np.array_equal(occupancy[0].numpy(), (crop == 20).astype(np.float32))
    # A bin centred on a voxel has no part of its neighbours: only ignored voxels themselves are not valid.
    assert np.array_equal(valid[0].numpy(), crop != -1)


@pytest.mark.parametrize("ids", [[2**24, 2**24 + 1, 2**24 + 2], [2**31 - 1, 2**31, 2**31 + 1], [1, 2, 2**32 - 2]])
def test_numbers_of_instances_may_be_as_large_as_uint32_holds(ids):
    label = torch.from_numpy(make_label())
    numbers = torch.tensor([0, *ids, -1])
    renumbered = numbers[torch.where(label < 0, 4, label // 10)]
    boxes = torch.tensor([[0.3, 1.2, 2.1, 6.6, 11.5, 20.4], [0, 0, 0, *SIZE], [1, 2, 3, 6, 11, 20]])
    wanted = mask_targets3d(label, torch.tensor([10, 20, 30]), boxes, (3, 5, 7))
    assert wanted[0].any(3).any(2).any(1).all()
    assert not wanted[1].all()
    for found, expected in zip(mask_targets3d(renumbered, torch.tensor(ids), boxes, (3, 5, 7)), wanted, strict=True):
        assert torch.equal(found, expected)


def test_the_face_between_two_touching_instances_by_hand():
    label = torch.zeros(1, 1, 4, dtype=torch.int64)
    label[..., :2], label[..., 2:] = 1, 2
    box = torch.tensor([[0.0, 0, 0, 1, 1, 4]] * 2)
    occupancy, valid = mask_targets3d(label, torch.tensor([1, 2]), box, (1, 1, 8))
    # Bin centres at 0.25, 0.75, ...: a quarter of the way past voxel centres, 3/4 and 1/4 beside the face.
    assert occupancy[0].flatten().tolist() == [1, 1, 1, 0.75, 0.25, 0, 0, 0]
    assert occupancy[1].flatten().tolist() == [0, 0, 0, 0.25, 0.75, 1, 1, 1]
    assert valid.all()


def test_outside_of_the_volume_the_border_goes_on():
    label = torch.ones(2, 3, 4, dtype=torch.int64)
    occupancy, valid = mask_targets3d(label, torch.tensor([1]), torch.tensor([[-5.0, -5, -5, 9, 9, 9]]), (3, 4, 5))
    assert (occupancy == 1).all()
    assert valid.all()


def test_nothing():
    label = torch.from_numpy(make_label())
    occupancy, valid = mask_targets3d(label, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 6), (2, 3, 4))
    assert occupancy.shape == valid.shape == (0, 2, 3, 4)
    assert valid.dtype == torch.bool


def test_permuting_axes_permutes_the_targets():
    label = torch.from_numpy(make_label())
    box = torch.tensor([[0.3, 1.2, 2.1, 6.6, 11.5, 20.4]])
    wanted = mask_targets3d(label, torch.tensor([20]), box, (3, 5, 7))
    found = mask_targets3d(label.permute(2, 0, 1), torch.tensor([20]), box[:, [2, 0, 1, 5, 3, 4]], (7, 3, 5))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b.permute(0, 3, 1, 2))


def test_compiles_whole():
    label, ids, boxes = (
        torch.from_numpy(make_label()),
        torch.tensor([20]),
        torch.tensor([[0.3, 1.2, 2.1, 6.6, 11.5, 20.4]]),
    )
    compiled = torch.compile(lambda *tensors: mask_targets3d(*tensors, (3, 5, 7)), fullgraph=True, backend="eager")
    for a, b in zip(compiled(label, ids, boxes), mask_targets3d(label, ids, boxes, (3, 5, 7)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"label": torch.zeros(7, 13, 22)}, TypeError, "label must be int64"),
        ({"label": torch.zeros(7, 0, 22, dtype=torch.int64)}, ValueError, "label is empty"),
        ({"ids": torch.zeros(2, dtype=torch.int64)}, ValueError, "ids must have one entry per box"),
        ({"boxes": torch.zeros(1, 6, dtype=torch.float64)}, TypeError, "boxes must be float32"),
        ({"boxes": torch.zeros(1, 6, device="meta")}, ValueError, "move them to one device"),
        ({"size": (3, 0, 7)}, ValueError, "size must be a positive int"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    arguments = {
        "label": torch.from_numpy(make_label()),
        "ids": torch.tensor([20]),
        "boxes": torch.tensor([[0.0, 0, 0, *SIZE]]),
        "size": (3, 5, 7),
    }
    with pytest.raises(error, match=message):
        mask_targets3d(**(arguments | changes))
