"""Foreground and borders: targets counted by hand and against SciPy, losses against their formula in NumPy."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from seg3d_monai.losses.semantic import semantic_losses, semantic_targets


def blobs(shape=(7, 13, 10), seed=0):
    """Labels that touch everywhere, background between some, a slab of ignored voxels."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 4, [-(-n // 3) for n in shape])
    label = np.kron(coarse, np.ones((3, 3, 3), np.int64))[tuple(slice(n) for n in shape)]
    label[:, :, -2:] = -1
    return label


def test_two_cells_that_touch_and_background_counted_by_hand():
    label = torch.tensor([[[0, 0, 5, 5, 5, 9, 9, -1]]])
    shares, known = semantic_targets(label, (1, 1, 8))
    assert known.flatten().tolist() == [1, 1, 1, 1, 1, 1, 1, 0]
    assert shares[0].flatten().tolist() == [0, 0, 1, 1, 1, 1, 1, 0]
    assert shares[1].flatten().tolist() == [0, 1, 1, 0, 1, 1, 0, 0]  # what is next to ignored voxels is not known
    shares, known = semantic_targets(label, (1, 1, 3))  # cells of 3 voxels, the last one cut
    assert known.flatten().tolist() == [1, 1, 0.5]
    assert shares[0].flatten().tolist() == pytest.approx([1 / 3, 1, 1])
    assert shares[1].flatten().tolist() == pytest.approx([2 / 3, 2 / 3, 0])


def test_borders_are_those_of_a_cross_of_neighbours():
    label = blobs()
    shares, known = semantic_targets(torch.from_numpy(label), label.shape)
    cross = ndimage.generate_binary_structure(3, 1)
    greatest = ndimage.maximum_filter(label, footprint=cross, mode="nearest")
    filled = np.where(label < 0, 99, label)
    least = ndimage.minimum_filter(filled, footprint=cross, mode="nearest")
    is_inner = ndimage.minimum_filter(label, footprint=cross, mode="nearest") >= 0
    assert is_inner.any()
    assert np.array_equal(shares[1].numpy()[is_inner] > 0, (greatest != least)[is_inner])
    assert np.array_equal(shares[0].numpy(), label > 0)
    assert np.array_equal(known.numpy(), label >= 0)


@pytest.mark.parametrize("size", [(7, 13, 10), (4, 5, 10)])
def test_losses_are_their_formulas(size):
    labels = [blobs(), np.zeros_like(blobs()), blobs(seed=3)]
    logits = torch.randn(3, 2, *size, generator=torch.Generator().manual_seed(0))
    found = semantic_losses(logits, [torch.from_numpy(label) for label in labels])
    cross_entropy = dice = 0.0
    for image, label in zip(logits.double().numpy(), labels, strict=True):
        shares, known = (part.double().numpy() for part in semantic_targets(torch.from_numpy(label), size))
        for logit, share in zip(image, shares, strict=True):
            prob = 1 / (1 + np.exp(-logit))
            each = -(share * np.log(prob) + (1 - share) * np.log(1 - prob))
            cross_entropy += (each * known).sum() / known.sum() / 2
            dice += (1 - (2 * (prob * share * known).sum() + 1) / (((prob + share) * known).sum() + 1)) / 2
    assert found["semantic_bce"].item() == pytest.approx(cross_entropy, rel=1e-5)
    assert found["semantic_dice"].item() == pytest.approx(dice, rel=1e-5)


def test_ignored_voxels_have_no_gradient_and_nothing_but_them_costs_nothing():
    label = blobs()
    logits = torch.randn(2, 2, *label.shape, requires_grad=True)
    losses = semantic_losses(logits, [torch.from_numpy(label), torch.full(label.shape, -1)])
    sum(losses.values()).backward()
    assert not logits.grad[0][:, label < 0].any()
    assert logits.grad[0][:, label >= 0].all()
    assert not logits.grad[1].any()
    only_ignored = semantic_losses(logits[1:], [torch.full(label.shape, -1)])
    assert [loss.item() for loss in only_ignored.values()] == [0, 0]
