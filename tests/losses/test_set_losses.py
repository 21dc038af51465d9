"""Formulas of set prediction against NumPy in float64, by hand, and in two dimensions."""

import numpy as np
import pytest
import torch

from seg3d_monai.losses.set_losses import (
    box_giou,
    box_l1,
    class_cross_entropy,
    class_focal,
    focal_loss,
    mask_bce,
    mask_dice,
)


def draw(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).requires_grad_()


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 1.5), (0.5, 0.0)])
def test_focal_loss_as_published(alpha, gamma):
    """FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t), Lin et al. 2017, equation 5."""
    logits = draw(3, 5, 4)
    truth = (draw(3, 5, 4, seed=1) > 0).double()
    found = focal_loss(logits, truth, alpha=alpha, gamma=gamma)
    for place in np.ndindex(3, 5, 4):
        prob, is_positive = 1 / (1 + np.exp(-logits[place].item())), truth[place].item() == 1
        prob_truth, alpha_truth = (prob, alpha) if is_positive else (1 - prob, 1 - alpha)
        assert found[place].item() == pytest.approx(-alpha_truth * (1 - prob_truth) ** gamma * np.log(prob_truth))
    assert torch.autograd.gradcheck(lambda x: focal_loss(x, truth, alpha=alpha, gamma=gamma), logits)


def test_focal_loss_of_sure_answers_is_finite():
    logits = torch.tensor([200.0, -200, 200, -200], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([1.0, 0, 0, 1]), alpha=0.25, gamma=2.0)
    torch.testing.assert_close(loss, torch.tensor([0.0, 0, 0.75 * 200, 0.25 * 200]))
    loss.sum().backward()
    assert logits.grad.isfinite().all()


def test_focal_class_loss():
    logits = draw(2, 3, 4, 3)
    classes = torch.tensor([[[0, 2, -1, 1]] * 3] * 2)
    counted = torch.tensor([True, True, True, False]).expand(2, 3, 4)
    found = class_focal(logits, classes, counted, alpha=0.25, gamma=2.0)
    prob = 1 / (1 + np.exp(-logits.detach().numpy()))
    for place in np.ndindex(2, 3, 4):
        wanted = 0.0
        for k in range(3):
            p = prob[(*place, k)]
            wanted += -0.25 * (1 - p) ** 2 * np.log(p) if k == classes[place] else -0.75 * p**2 * np.log(1 - p)
        assert found[place].item() == pytest.approx(wanted * bool(counted[place]))


def test_cross_entropy_is_a_weighted_mean_of_each_layer():
    logits = draw(2, 3, 4, 3)  # two classes and "no object"
    classes = torch.tensor([[[0, 1, -1, -1]] * 3, [[-1, -1, 1, -1]] * 3])
    counted = torch.tensor([[[True, True, True, False]] * 3, [[True, False, True, True]] * 3])
    found = class_cross_entropy(logits, classes, counted, no_object_weight=0.1).sum((1, 2))
    for layer in range(2):
        total = 0.0
        for place in np.ndindex(3, 4):
            if not counted[layer][place]:
                continue
            row, wanted = logits[layer][place].detach().numpy(), int(classes[layer][place])
            weight = 0.1 if wanted < 0 else 1.0
            total += weight * (np.log(np.exp(row).sum()) - row[2 if wanted < 0 else wanted])
        assert found[layer].item() == pytest.approx(total)


def test_cross_entropy_of_no_query_that_counts_is_zero():
    logits = draw(2, 3, 4, 3)
    none = torch.zeros(2, 3, 4, dtype=torch.bool)
    loss = class_cross_entropy(logits, torch.full((2, 3, 4), -1), none, no_object_weight=0.1)
    loss.sum().backward()
    assert not loss.any()
    assert not logits.grad.any()


def naive_masks(logits, truth, valid):
    x, t = (v.detach().numpy()[valid.numpy()] for v in (logits, truth))
    prob = 1 / (1 + np.exp(-x))
    bce = -(t * np.log(prob) + (1 - t) * np.log(1 - prob)).sum() / max(1, len(t))
    return bce, 1 - (2 * (prob * t).sum() + 1) / (prob.sum() + t.sum() + 1)


def test_mask_losses():
    logits, occupancy, valid = draw(4, 6, 20), (draw(4, 1, 20, seed=1) > 0).double(), draw(4, 1, 20, seed=2) > -1
    valid[2] = False  # nothing known
    occupancy[3] = 0  # nothing there
    bce, dice = (loss(logits, occupancy, valid.double()) for loss in (mask_bce, mask_dice))
    assert bce.shape == dice.shape == (4, 6)
    for g, row in np.ndindex(4, 6):
        wanted = naive_masks(logits[g, row], occupancy[g, 0], valid[g, 0])
        assert (bce[g, row].item(), dice[g, row].item()) == pytest.approx(wanted)
    assert not bce[2].any()
    assert not dice[2].any()
    gradient = torch.autograd.grad((bce + dice).sum(), logits)[0]
    assert not gradient[~valid.expand_as(gradient)].any()
    assert gradient[valid.expand_as(gradient)].all()


def test_mask_losses_by_hand():
    occupancy, valid = torch.tensor([1.0, 1, 0, 0]), torch.ones(4)
    unsure = torch.zeros(4)
    assert mask_bce(unsure, occupancy, valid).item() == pytest.approx(np.log(2))
    assert mask_dice(unsure, occupancy, valid).item() == pytest.approx(1 - (2 * 1 + 1) / (2 + 2 + 1))
    sure = torch.tensor([99.0, 99, -99, -99])
    assert mask_bce(sure, occupancy, valid).item() == pytest.approx(0)
    assert mask_dice(sure, occupancy, valid).item() == pytest.approx(0)
    assert mask_bce(-sure, occupancy, valid).item() == pytest.approx(99)
    assert mask_dice(-sure, occupancy, valid).item() == pytest.approx(1 - 1 / 5)


def test_box_losses_by_hand():
    boxes = torch.tensor([[0.0, 0, 0, 2, 4, 8], [1, 2, 4, 3, 6, 12]])
    truth = torch.tensor([[0.0, 0, 0, 2, 4, 8], [0, 0, 0, 2, 4, 8]])
    # Centres differ by 1, 2 and 4 voxels of 4, 10 and 16; extents are the same.
    torch.testing.assert_close(box_l1(boxes, truth, (4, 10, 16)), torch.tensor([0, 1 / 4 + 2 / 10 + 4 / 16]))
    torch.testing.assert_close(box_giou(boxes, truth), torch.tensor([0, 1 - 8 / 120 + 96 / 216]))
    wider = torch.tensor([[-1.0, 0, 0, 3, 4, 8]])
    torch.testing.assert_close(box_l1(wider, truth[:1], (4, 10, 16)), torch.tensor([2 / 4]))


def test_box_losses_of_one_voxel_thickness_are_those_of_rectangles():
    generator = np.random.default_rng(0)
    lower = generator.uniform(0, 5, (2, 30, 2))
    boxes, truth = np.concatenate([lower, lower + generator.uniform(1, 6, (2, 30, 2))], 2)
    size = np.array([10, 14])

    def thick(rectangles):
        flat = torch.from_numpy(rectangles)
        one = torch.ones(30, 1, dtype=torch.float64)
        return torch.cat([0 * one, flat[:, :2], one, flat[:, 2:]], 1)

    def in_shares(rectangles):
        lower, upper = rectangles[:, :2] / size, rectangles[:, 2:] / size
        return np.concatenate([(lower + upper) / 2, upper - lower], 1)

    l1 = np.abs(in_shares(boxes) - in_shares(truth)).sum(1)
    np.testing.assert_allclose(box_l1(thick(boxes), thick(truth), (1, 10, 14)).numpy(), l1)
    inner = np.minimum(boxes[:, 2:], truth[:, 2:]) - np.maximum(boxes[:, :2], truth[:, :2])
    outer = np.maximum(boxes[:, 2:], truth[:, 2:]) - np.minimum(boxes[:, :2], truth[:, :2])
    shared, hull = inner.clip(0).prod(1), outer.prod(1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (truth[:, 2:] - truth[:, :2]).prod(1) - shared
    np.testing.assert_allclose(box_giou(thick(boxes), thick(truth)).numpy(), 1 - shared / union + (hull - union) / hull)
