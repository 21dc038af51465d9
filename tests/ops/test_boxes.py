"""Box arithmetic against exact fractions and hand-written numbers."""

from fractions import Fraction

import pytest
import torch
from monai.apps.detection.utils.box_coder import BoxCoder

from seg3d_monai.ops.boxes import (
    ANCHOR_WEIGHTS,
    ROI_WEIGHTS,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    non_empty,
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
