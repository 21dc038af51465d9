"""Box arithmetic against exact fractions and hand-written numbers."""

from fractions import Fraction

import pytest
import torch
from monai.apps.detection.utils.box_coder import BoxCoder

from seg3d_monai.ops.boxes import (
    ANCHOR_WEIGHTS,
    ROI_WEIGHTS,
    centre_extent,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    non_empty,
    paired_giou,
    pairwise_giou,
    pairwise_iou,
)


def random_boxes(count, size=(7, 11, 19), seed=0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.stack([torch.randint(0, n + 1, (count, 2), generator=generator) for n in size], 2).float()
    return torch.cat([corners.amin(1), corners.amax(1)], 1)


def exact_iou(a, b):
    shared = volume_a = volume_b = 1
    for axis in range(3):
        shared *= max(0, min(a[axis + 3], b[axis + 3]) - max(a[axis], b[axis]))
        volume_a *= a[axis + 3] - a[axis]
        volume_b *= b[axis + 3] - b[axis]
    union = volume_a + volume_b - shared
    return Fraction(int(shared), int(union)) if union else Fraction(0)


def test_iou_equals_exact_fractions_also_of_empty_boxes():
    boxes, others = random_boxes(40), random_boxes(30, seed=1)
    assert ((boxes[:, 3:] - boxes[:, :3]).amin(1) == 0).any(), "the draw should hold empty boxes"
    wanted = torch.tensor([[float(exact_iou(a, b)) for b in others.tolist()] for a in boxes.tolist()])
    torch.testing.assert_close(pairwise_iou(boxes, others), wanted, rtol=0, atol=1e-7)


def test_iou_by_hand():
    a = torch.tensor([[0.0, 0, 0, 2, 4, 8], [0, 0, 0, 2, 4, 0], [5, 5, 5, 4, 4, 4]])
    b = torch.tensor([[1.0, 2, 4, 3, 6, 12], [0, 0, 0, 2, 4, 8], [2, 0, 0, 4, 4, 8]])
    wanted = torch.tensor([[8 / 120, 1, 0], [0, 0, 0], [0, 0, 0]])
    torch.testing.assert_close(pairwise_iou(a, b), wanted)


def test_iou_leaves_its_arguments_alone_and_keeps_float64():
    boxes = random_boxes(5).double()
    copy = boxes.clone()
    assert pairwise_iou(boxes, boxes).dtype == torch.float64
    assert torch.equal(boxes, copy)


@pytest.mark.parametrize(("m", "g"), [(0, 3), (3, 0), (0, 0)])
def test_iou_of_nothing_is_empty(m, g):
    assert pairwise_iou(random_boxes(m), random_boxes(g)).shape == (m, g)


def test_clip_takes_size_as_depth_height_width():
    boxes = torch.tensor([[-1.0, -2, -3, 100, 100, 100], [1, 2, 3, 4, 5, 6], [9, 9, 30, 10, 10, 40]])
    wanted = torch.tensor([[0.0, 0, 0, 5, 7, 11], [1, 2, 3, 4, 5, 6], [5, 7, 11, 5, 7, 11]])
    assert torch.equal(clip_boxes(boxes, (5, 7, 11)), wanted)
    assert clip_boxes(boxes[:0], (5, 7, 11)).shape == (0, 6)


def test_non_empty_looks_at_every_axis():
    boxes = torch.tensor([[0.0, 0, 0, 2, 2, 2], [0, 0, 0, 1.5, 9, 9], [0, 0, 0, 9, 9, 1.5], [1, 1, 1, 3, 3, 4]])
    assert non_empty(boxes, 2.0).tolist() == [0, 3]
    assert non_empty(boxes[:0], 2.0).shape == (0,)


@pytest.mark.parametrize(("weights", "centre", "extent"), [(ANCHOR_WEIGHTS, 1.0, 1.0), (ROI_WEIGHTS, 10.0, 5.0)])
def test_encoding_by_hand(weights, centre, extent):
    boxes = torch.tensor([[0.0, 0, 0, 2, 4, 8]])
    truth = torch.tensor([[1.0, 0, 4, 3, 8, 12]])  # centres move by 1, 2, 4 = half an extent; extents 1x, 2x, 1x
    wanted = torch.tensor([[0.5, 0.5, 0.5, 0, 0, 0]]) * centre
    wanted[0, 4] = extent * torch.tensor(2.0).log()
    torch.testing.assert_close(encode_boxes(truth, boxes, weights), wanted)


@pytest.mark.parametrize("weights", [ANCHOR_WEIGHTS, ROI_WEIGHTS])
def test_decoding_undoes_encoding(weights):
    boxes, truth = (random_boxes(50, seed=s) + torch.tensor([0.0, 0, 0, 1, 1.5, 2]) for s in (2, 3))
    deltas = encode_boxes(truth, boxes, weights)
    torch.testing.assert_close(decode_boxes(deltas, boxes, weights), truth, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("weights", [ANCHOR_WEIGHTS, ROI_WEIGHTS])
def test_coding_of_nothing_is_empty(weights):
    none = torch.zeros((0, 6))
    assert encode_boxes(none, none, weights).shape == (0, 6)
    assert decode_boxes(none, none, weights).shape == (0, 6)


def test_half_precision_deltas_do_not_lower_the_precision_of_boxes():
    boxes = torch.tensor([[500.25, 511.5, 1023.125, 510.75, 530.5, 1040.0]])
    decoded = decode_boxes(torch.zeros(1, 6, dtype=torch.bfloat16), boxes, ANCHOR_WEIGHTS)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, boxes)


@pytest.mark.parametrize("weights", [ANCHOR_WEIGHTS, ROI_WEIGHTS])
def test_coding_agrees_with_monai(weights):
    coder = BoxCoder(weights=weights)
    boxes, truth = (random_boxes(40, seed=s) + torch.tensor([0.0, 0, 0, 1, 1.5, 2]) for s in (4, 5))
    deltas = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * 8
    torch.testing.assert_close(encode_boxes(truth, boxes, weights), coder.encode_single(truth, boxes))
    torch.testing.assert_close(decode_boxes(deltas, boxes, weights), coder.decode_single(deltas, boxes))


def test_deltas_of_a_diverged_network_give_boxes_that_are_not_finite_rather_than_an_error():
    deltas = torch.full((1, 6), float("nan"))
    decoded = decode_boxes(deltas, torch.tensor([[0.0, 0, 0, 2, 4, 8]]), ANCHOR_WEIGHTS)
    assert decoded.isnan().all()
    assert len(non_empty(decoded, 1.0)) == 0


def exact_giou(a, b):
    """IoU less the share of the hull that neither box covers; nothing less where the hull is empty."""
    hull = shared = volume_a = volume_b = 1
    for axis in range(3):
        shared *= max(0, min(a[axis + 3], b[axis + 3]) - max(a[axis], b[axis]))
        volume_a *= a[axis + 3] - a[axis]
        volume_b *= b[axis + 3] - b[axis]
        hull *= max(a[axis + 3], b[axis + 3]) - min(a[axis], b[axis])
    union = int(volume_a + volume_b - shared)
    return exact_iou(a, b) - (Fraction(int(hull) - union, int(hull)) if hull else 0)


def test_giou_equals_exact_fractions_also_of_empty_boxes():
    boxes, others = random_boxes(40), random_boxes(30, seed=1)
    assert ((boxes[:, 3:] - boxes[:, :3]).amin(1) == 0).any(), "the draw should hold empty boxes"
    wanted = torch.tensor([[float(exact_giou(a, b)) for b in others.tolist()] for a in boxes.tolist()])
    torch.testing.assert_close(pairwise_giou(boxes, others), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(paired_giou(boxes[:30], others), wanted[:30].diagonal(), rtol=0, atol=1e-6)


def test_giou_by_hand():
    box = torch.tensor([[0.0, 0, 0, 2, 4, 8]])
    others = torch.tensor(
        [
            [0.0, 0, 0, 2, 4, 8],  # itself
            [0, 1, 2, 1, 3, 6],  # nested: 8 of 64, the hull is the box
            [2, 0, 0, 4, 4, 8],  # touches: nothing shared, the hull is full
            [3, 0, 0, 5, 4, 8],  # a gap of one voxel: 32 of 160 empty
            [1, 2, 4, 3, 6, 12],  # shares 8 of 120 in a hull of 216
            [1, 1, 1, 1, 3, 3],  # empty, inside
            [7, 7, 7, 7, 7, 7],  # a point outside: a hull of 7 * 7 * 8, 64 of it covered
        ]
    )
    wanted = torch.tensor([[1, 8 / 64, 0, -32 / 160, 8 / 120 - 96 / 216, 0, -(392 - 64) / 392]])
    torch.testing.assert_close(pairwise_giou(box, others), wanted)
    torch.testing.assert_close(pairwise_giou(others, box), wanted.T)
    point = torch.zeros(1, 6)
    assert pairwise_giou(point, point).item() == 0
    assert pairwise_giou(box, others).amin() >= -1


def test_giou_of_volumes_of_one_voxel_thickness_is_that_of_rectangles():
    boxes, others = random_boxes(20), random_boxes(20, seed=1)
    for rows in (boxes, others):
        rows[:, 0], rows[:, 3] = 0, 1
    area = [(b[:, 4] - b[:, 1]) * (b[:, 5] - b[:, 2]) for b in (boxes, others)]
    shared = torch.ones(20)
    hull = torch.ones(20)
    for axis in (1, 2):
        low, high = (f(boxes[:, axis + 3], others[:, axis + 3]) for f in (torch.minimum, torch.maximum))
        shared *= (low - torch.maximum(boxes[:, axis], others[:, axis])).clamp(min=0)
        hull *= high - torch.minimum(boxes[:, axis], others[:, axis])
    union = area[0] + area[1] - shared
    assert (union > 0).all()
    torch.testing.assert_close(paired_giou(boxes, others), shared / union - (hull - union) / hull)


def test_giou_is_differentiable_and_never_below_float32():
    generator = torch.Generator().manual_seed(0)
    lower = torch.rand(2, 8, 3, generator=generator, dtype=torch.float64) * 5
    boxes, others = torch.cat([lower, lower + 0.5 + lower.flip(1)], 2).unbind(0)
    boxes.requires_grad_()
    others.requires_grad_()
    assert torch.autograd.gradcheck(paired_giou, (boxes, others))
    assert torch.autograd.gradcheck(pairwise_giou, (boxes, others))
    assert paired_giou(boxes, others).dtype == torch.float64
    assert pairwise_giou(boxes.bfloat16(), others.bfloat16()).dtype == torch.float32


def test_paired_and_pairwise_giou_agree_to_the_gradient():
    generator = torch.Generator().manual_seed(0)
    lower = 20 * torch.rand(2, 9, 3, generator=generator, dtype=torch.float64)
    boxes, others = torch.cat([lower, lower + 8 * torch.rand(2, 9, 3, generator=generator, dtype=torch.float64)], -1)
    others[0], others[1, 3:] = boxes[0], others[1, :3]  # one that is the same, one that is empty
    leaves = [values.clone().requires_grad_() for values in (boxes, others)]
    paired, pairwise = paired_giou(*leaves), pairwise_giou(*leaves).diagonal()
    torch.testing.assert_close(paired, pairwise)
    for found, wanted in zip(
        torch.autograd.grad(paired.sum(), leaves), torch.autograd.grad(pairwise.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_giou_draws_a_box_that_is_apart():
    """Unlike IoU it has a gradient there: moving towards the truth, whichever axis parts them, is better."""
    truth = torch.tensor([[10.0, 10, 10, 12, 14, 18]]).repeat(3, 1)
    boxes = truth.clone()
    for axis, step in enumerate((5.0, -7.0, 11.0)):
        boxes[axis, [axis, axis + 3]] += step
    boxes.requires_grad_()
    paired_giou(boxes, truth).sum().backward()
    move = boxes.grad[:, :3] + boxes.grad[:, 3:]
    assert torch.equal(move.diagonal().sign(), torch.tensor([-1.0, 1.0, -1.0]))


@pytest.mark.parametrize(("m", "g"), [(0, 3), (3, 0), (0, 0)])
def test_giou_of_nothing_is_empty(m, g):
    assert pairwise_giou(random_boxes(m), random_boxes(g)).shape == (m, g)
    assert paired_giou(random_boxes(0), random_boxes(0)).shape == (0,)


def test_centres_and_extents_are_shares_of_the_volume():
    boxes = torch.tensor([[[0.0, 2, 4, 2, 6, 12], [0, 0, 0, 4, 8, 16]]])
    wanted = torch.tensor([[[0.25, 0.5, 0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 1, 1, 1]]])
    assert torch.equal(centre_extent(boxes, (4, 8, 16)), wanted)
    assert centre_extent(boxes[:, :0], (4, 8, 16)).shape == (1, 0, 6)
