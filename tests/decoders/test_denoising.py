"""Denoising queries: how many, of which instance, how far from the truth, and who sees whom."""

import pytest
import torch
from torch import nn

from seg3d_monai.decoders import Denoising

CLASSES, CHANNELS, MATCHING = 5, 8, 7


def make_target(count, seed=0):
    """Instances of extents between 2 and 20 voxels, another range on each axis."""
    generator = torch.Generator().manual_seed(seed)
    lower = torch.rand(count, 3, generator=generator) * torch.tensor([6.0, 10, 14])
    extent = torch.rand(count, 3, generator=generator) * torch.tensor([2.0, 6, 18]) + 2
    classes = torch.randint(CLASSES, (count,), generator=generator)
    return {"boxes": torch.cat([lower, lower + extent], 1), "classes": classes}


def make_embedding():
    """Content of a class that the class can be read from: row k is k + 1 everywhere."""
    embedding = nn.Embedding(CLASSES, CHANNELS)
    embedding.weight.data = (torch.arange(CLASSES)[:, None] + 1.0).repeat(1, CHANNELS)
    return embedding


def draw(counts, seed=0, **settings):
    torch.manual_seed(seed)
    targets = [make_target(count, seed=n) for n, count in enumerate(counts)]
    return targets, Denoising(**settings)(targets, make_embedding(), MATCHING)


def test_no_instance_in_the_batch_makes_no_query():
    assert draw([0, 0])[1] is None


# By hand: slots = largest G, groups = num_queries // (2 * slots) or 1, T = groups * 2 * slots.
@pytest.mark.parametrize(
    ("counts", "num_queries", "expected"),
    [([1], 100, 100), ([3, 0, 7], 100, 98), ([7], 40, 28), ([60, 1], 100, 120), ([0, 1, 300], 100, 400)],
)
def test_number_of_queries(counts, num_queries, expected):
    queries = draw(counts, num_queries=num_queries)[1]
    assert queries.content.shape == (len(counts), expected, CHANNELS)
    assert queries.boxes.shape == (len(counts), expected, 6)
    assert queries.boxes.dtype == torch.float32
    assert queries.target_index.shape == (len(counts), expected)
    assert queries.target_index.dtype == torch.int64
    assert queries.attention_mask.shape == (len(counts), MATCHING + expected, MATCHING + expected)


def test_target_index_by_hand():
    index = draw([2, 0, 3], num_queries=13)[1].target_index.tolist()
    assert index == [
        [0, 1, -2, -1, -1, -2] * 2,
        [-2] * 12,
        [0, 1, 2, -1, -1, -1] * 2,
    ]


def test_a_crowded_image_has_a_random_subset_denoised():
    targets, queries = draw([0, 1, 300], num_queries=100, max_queries=240, box_noise=0.0, label_noise=0.0)
    index = queries.target_index
    assert (index[0] == -2).all()
    assert index[1].tolist() == [0] + [-2] * 119 + [-1] + [-2] * 119
    positives = index[2, :120]
    assert (index[2, 120:] == -1).all()
    assert len(positives.unique()) == 120
    assert positives.min() >= 0
    assert positives.max() > 150  # not the first ones: 120 of 300 all below 150 has no chance
    assert torch.equal(queries.boxes[2, :120], targets[2]["boxes"][positives])
    assert torch.equal(queries.content[2, :120, 0] - 1, targets[2]["classes"][positives].float())
    again = draw([0, 1, 300], seed=1, num_queries=100, max_queries=240)[1]
    assert not torch.equal(again.target_index, index)


def test_without_noise_queries_are_the_instances():
    targets, queries = draw([4, 2], num_queries=16, label_noise=0.0, box_noise=0.0)
    for n, target in enumerate(targets):
        for t, g in enumerate([0, 1, 2, 3] * 4):
            if g < len(target["classes"]):
                assert torch.equal(queries.boxes[n, t], target["boxes"][g])
                assert (queries.content[n, t] == target["classes"][g] + 1).all()
            else:
                assert (queries.content[n, t] == 0).all()
                assert queries.boxes[n, t].tolist() == [0, 0, 0, 1, 1, 1]


def test_permuted_instances_are_permuted_queries():
    target = make_target(5)
    order = torch.tensor([3, 0, 4, 1, 2])
    make = Denoising(num_queries=10, label_noise=0.0, box_noise=0.0)
    straight = make([target], make_embedding(), MATCHING)
    permuted = make([{key: values[order] for key, values in target.items()}], make_embedding(), MATCHING)
    rows = torch.cat([order, order + 5])
    assert torch.equal(permuted.boxes, straight.boxes[:, rows])
    assert torch.equal(permuted.content, straight.content[:, rows])
    assert torch.equal(permuted.target_index, straight.target_index)
    assert torch.equal(permuted.attention_mask, straight.attention_mask)


@pytest.mark.parametrize("box_noise", [0.1, 0.4, 0.5])
def test_noise_of_positives_and_negatives_fills_its_range(box_noise):
    targets, queries = draw([10], num_queries=2000, max_queries=2000, box_noise=box_noise)
    truth = targets[0]["boxes"]
    half = ((truth[:, 3:] - truth[:, :3]) / 2).repeat(1, 2)
    shift = (queries.boxes.view(100, 2, 10, 6) - truth) / half / box_noise
    positive, negative = shift[:, 0].abs(), shift[:, 1].abs()
    assert positive.max() < 1 + 1e-4
    assert negative.min() > 1 - 1e-4
    assert negative.max() < 2 + 1e-4
    # Uniform: 6,000 draws have a mean within 0.02 (five standard deviations), on each axis and in both directions.
    assert (positive.mean((0, 1)) - 0.5).abs().max() < 0.05
    assert (negative.mean((0, 1)) - 1.5).abs().max() < 0.05
    assert ((shift > 0).float().mean((0, 2)) - 0.5).abs().max() < 0.08
    assert torch.quantile(positive.flatten(), 0.02) < 0.05
    assert torch.quantile(positive.flatten(), 0.98) > 0.95


@pytest.mark.parametrize("box_noise", [0.4, 1.0])
def test_noised_boxes_are_boxes(box_noise):
    queries = draw([30, 300, 1], box_noise=box_noise)[1]
    assert (queries.boxes[..., 3:] > queries.boxes[..., :3]).all()


@pytest.mark.parametrize("label_noise", [0.0, 0.2, 1.0])
def test_labels_are_drawn_anew_at_the_stated_rate(label_noise):
    targets, queries = draw([20], num_queries=8000, max_queries=8000, label_noise=label_noise)
    labels = queries.content[0, :, 0].view(-1, 20) - 1
    flipped = (labels != targets[0]["classes"]).float().mean().item()
    # A fifth of the draws gives the same class again; five standard deviations of 8000 draws are 0.028.
    assert flipped == pytest.approx(label_noise * (CLASSES - 1) / CLASSES, abs=0.028)
    assert set(labels.unique().tolist()) <= set(range(CLASSES))


def test_who_sees_whom():
    queries = draw([2, 3], num_queries=13)[1]
    index, forbidden = queries.target_index, queries.attention_mask
    for n in range(2):
        for row in range(MATCHING + 12):
            for column in range(MATCHING + 12):
                if column < MATCHING:
                    allowed = True
                elif row < MATCHING:
                    allowed = False
                else:
                    same = (row - MATCHING) // 6 == (column - MATCHING) // 6
                    allowed = same and index[n, column - MATCHING] != -2
                assert forbidden[n, row, column].item() is not allowed


def test_labels_carry_the_gradient_to_the_embedding():
    torch.manual_seed(0)
    embedding = nn.Embedding(1, CHANNELS)
    target = {"boxes": make_target(3)["boxes"], "classes": torch.zeros(3, dtype=torch.int64)}
    queries = Denoising(num_queries=12)([target, make_target(0)], embedding, MATCHING)
    queries.content.sum().backward()
    assert embedding.weight.grad.tolist() == [[12.0] * CHANNELS]
    assert not queries.boxes.requires_grad


def test_draws_repeat_with_the_seed():
    first, second = draw([5, 3], seed=4)[1], draw([5, 3], seed=4)[1]
    assert torch.equal(first.boxes, second.boxes)
    assert torch.equal(first.content, second.content)
    assert not torch.equal(first.boxes, draw([5, 3], seed=5)[1].boxes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"box_noise": 1.5}, "box_noise is 1.5"),
        ({"label_noise": -0.1}, "label_noise is -0.1"),
        ({"num_queries": 1}, "num_queries is 1"),
        ({"num_queries": 100, "max_queries": 50}, "max_queries is 50"),
    ],
)
def test_user_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        Denoising(**settings)


def test_repr_shows_the_settings():
    assert repr(Denoising()) == "Denoising(num_queries=100, label_noise=0.2, box_noise=0.4, max_queries=400)"
