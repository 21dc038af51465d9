"""Pairs and extents of labels: by hand, against naive counts and SciPy."""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy import ndimage

from seg3d_monai.ops import label_extents, label_pairs

pytestmark = pytest.mark.usefixtures("kernels")


def runs(shape, num_labels, seed):
    """Labels that stay the same for a few voxels along x."""
    rng = np.random.default_rng(seed)
    few = rng.integers(0, num_labels, (*shape[:2], -(-shape[2] // 3)))
    return torch.from_numpy(np.repeat(few, 3, axis=2)[..., : shape[2]].astype(np.int32))


def strided(labels):
    """The same labels with other strides, none of them 1."""
    wide = torch.full((labels.shape[2] * 2, labels.shape[0], labels.shape[1] + 3), -7, dtype=torch.int32)
    view = wide[::2, :, 2:-1].permute(1, 2, 0)
    view.copy_(labels)
    return view


@pytest.mark.parametrize("num_labels", [1, 2, 40, 3000])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, strided])
def test_pairs_are_those_of_a_naive_count(num_labels, layout):
    a, b = runs((7, 11, 52), num_labels, 0), runs((7, 11, 52), 5, 1)
    wanted = Counter(zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
    pairs, counts = label_pairs(layout(a), layout(b))
    assert pairs.dtype == counts.dtype == torch.int64
    assert [(*pair, n) for pair, n in zip(pairs.tolist(), counts.tolist(), strict=True)] == [
        (*pair, wanted[pair]) for pair in sorted(wanted)
    ]


def test_pairs_by_hand_with_the_largest_labels():
    most = 2**31 - 1
    a = torch.tensor([[[0, most, most, 3], [3, 3, 0, most]]], dtype=torch.int32)
    b = torch.tensor([[[1, most, 0, most], [most, most, 1, 0]]], dtype=torch.int32)
    pairs, counts = label_pairs(a, b)
    assert pairs.tolist() == [[0, 1], [3, most], [most, 0], [most, most]]
    assert counts.tolist() == [2, 3, 2, 1]


def test_more_pairs_than_the_first_table_holds():
    a = torch.arange(20_000, dtype=torch.int32).reshape(10, 40, 50)
    pairs, counts = label_pairs(a, a.flip(2))
    assert pairs[:, 0].tolist() == list(range(20_000))
    assert pairs[:, 1].tolist() == a.flip(2).flatten().tolist()
    assert counts.tolist() == [1] * 20_000


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, strided])
def test_extents_are_those_of_scipy(layout):
    labels = runs((6, 9, 31), 70, 2)
    labels[labels == 33] = 0  # one that does not occur, beside the two at the end
    found = label_extents(layout(labels), 72)
    array, index = labels.numpy(), np.arange(1, 73)
    voxels = ndimage.sum_labels(np.ones_like(array), array, index)
    assert found.voxels.tolist() == voxels.tolist()
    grid = np.indices(array.shape)
    assert np.array_equal(found.sums, np.stack([ndimage.sum_labels(g, array, index) for g in grid], 1))
    for label, box in enumerate(ndimage.find_objects(array, 72)):
        lower, upper = ([0] * 3, [0] * 3) if box is None else ([s.start for s in box], [s.stop for s in box])
        assert found.lower[label].tolist() == lower
        assert found.upper[label].tolist() == upper
    assert found.voxels[32] == 0


@pytest.mark.parametrize("shape", [(0, 4, 5), (3, 4, 0)])
def test_nothing(shape):
    empty = torch.zeros(shape, dtype=torch.int32)
    pairs, counts = label_pairs(empty, empty)
    assert pairs.shape == (0, 2)
    assert counts.shape == (0,)
    assert label_extents(empty, 2).voxels.tolist() == [0, 0]
    assert label_extents(torch.zeros(2, 3, 4, dtype=torch.int32), 0).upper.shape == (0, 3)


def test_the_operators_keep_the_rules_of_operators():
    a, b = runs((3, 4, 10), 4, 3), runs((3, 4, 10), 5, 4)
    torch.library.opcheck(torch.ops.seg3d.label_pairs.default, (a, b))
    torch.library.opcheck(torch.ops.seg3d.label_extents.default, (a, 4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: label_pairs(x.long(), x), TypeError, "a must be int32"),
        (lambda x: label_pairs(x, x[0]), ValueError, r"b must have the shape \[D, H, W\]"),
        (lambda x: label_pairs(x, x[:1]), ValueError, r"a has the shape \(2, 3, 4\) and b \(1, 3, 4\)"),
        (lambda x: label_pairs(x, x - 1), RuntimeError, "negative"),
        (lambda x: label_extents(x.float(), 1), TypeError, "labels must be int32"),
        (lambda x: label_extents(x, -1), ValueError, "num_labels must be 0 or more, got -1"),
        (lambda x: label_extents(x + 3, 2), RuntimeError, "not in 0 to num_labels"),
        (lambda x: label_extents(x - 1, 2), RuntimeError, "not in 0 to num_labels"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 3, 4, dtype=torch.int32))
