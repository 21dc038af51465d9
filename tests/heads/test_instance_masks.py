"""Instances of queries, with masks laid out by hand on anisotropic grids."""

import math

import pytest
import torch
import torch.nn.functional as F

from seg3d_monai.heads.instance_masks import select_instances

SIZE = (5, 9, 14)  # not a multiple of the stride on y
STRIDE = (1, 2, 2)
CELLS = (5, 5, 7)
SURE = 6.0


def scene(blocks, probs, classes=2):
    """Queries whose masks are blocks of cells (z1, y1, x1, z2, y2, x2): a channel each, 1 inside, -1 outside."""
    features = torch.full((max(len(blocks), 1), *CELLS), -1.0)
    for q, (z1, y1, x1, z2, y2, x2) in enumerate(blocks):
        features[q, z1:z2, y1:y2, x1:x2] = 1
    logits = torch.full((len(blocks), classes), -20.0)
    for q, prob in enumerate(probs):
        logits[q, q % classes] = torch.logit(torch.tensor(prob))
    return logits, SURE * torch.eye(max(len(blocks), 1))[: len(blocks)], features


def voxels_of(found, row):
    """The voxels of an instance at a probability of one half, over the whole volume."""
    volume = torch.zeros(SIZE, dtype=torch.bool)
    z1, y1, x1, z2, y2, x2 = found["boxes"][row].int().tolist()
    logits = found["mask_logits"][row]
    assert logits.shape == (z2 - z1, y2 - y1, x2 - x1)
    volume[z1:z2, y1:y2, x1:x2] = logits > 0
    return volume


def dense(embeds, features, query):
    """The mask of a query, evaluated everywhere, then interpolated to voxels."""
    logits = torch.einsum("c,cdhw->dhw", embeds[query], features)
    grown = F.interpolate(logits[None, None], scale_factor=STRIDE, mode="trilinear", align_corners=False)[0, 0]
    return grown[: SIZE[0], : SIZE[1], : SIZE[2]] > 0


BLOCKS = [(1, 1, 2, 3, 3, 5), (0, 0, 0, 5, 5, 1), (4, 3, 5, 5, 5, 7)]  # inside; along a face; in the far corner


@pytest.mark.parametrize("with_boxes", [False, True])
def test_masks_boxes_scores_and_classes(with_boxes):
    logits, embeds, features = scene(BLOCKS, [0.5, 0.9, 0.7])
    boxes = torch.tensor(BLOCKS).float() * torch.tensor([*STRIDE, *STRIDE]) if with_boxes else None
    found = select_instances(logits, embeds, features, STRIDE, SIZE, boxes, score_threshold=0.1, has_no_object=False)
    quality = 1 / (1 + math.exp(-SURE))
    torch.testing.assert_close(found["scores"], torch.tensor([0.9, 0.7, 0.5]) * quality)
    assert found["classes"].tolist() == [1, 0, 0]
    for row, query in enumerate([1, 2, 0]):
        assert torch.equal(voxels_of(found, row), dense(embeds, features, query))
    # One cell around the block, clipped to the volume.
    assert found["boxes"].tolist() == [[0, 0, 0, 5, 9, 4], [3, 4, 8, 5, 9, 14], [0, 0, 2, 4, 8, 12]]


def test_a_mask_is_looked_for_around_the_box_only():
    logits, embeds, features = scene([(0, 0, 0, 2, 2, 2)], [0.8])
    features[0, 4, 4, 6] = 1  # a speck far away
    boxes = torch.tensor([[0.0, 0, 0, 2, 4, 4]])
    near = select_instances(logits, embeds, features, STRIDE, SIZE, boxes, score_threshold=0.1, has_no_object=False)
    everywhere = select_instances(logits, embeds, features, STRIDE, SIZE, score_threshold=0.1, has_no_object=False)
    assert near["boxes"].tolist() == [[0, 0, 0, 3, 6, 6]]
    assert everywhere["boxes"].tolist() == [[0, 0, 0, 5, 9, 14]]


def test_no_object_is_no_class():
    logits, embeds, features = scene(BLOCKS, [0.5, 0.5, 0.5])
    logits = torch.tensor([[3.0, 0, 0], [0, 0, 9], [0, 2, 1]])
    found = select_instances(logits, embeds, features, STRIDE, SIZE, score_threshold=0.1, has_no_object=True)
    assert found["classes"].tolist() == [0, 1]
    prob = logits.softmax(-1)
    torch.testing.assert_close(found["scores"], torch.stack([prob[0, 0], prob[2, 1]]) / (1 + math.exp(-SURE)))


@pytest.mark.parametrize("box", [(-9.0, -9, -9, -5, -5, -5), (40.0, 40, 40, 50, 50, 50), (3.0, 3, 3, 3, 3, 3)])
def test_boxes_outside_and_empty_ones_do_no_harm(box):
    logits, embeds, features = scene([(0, 0, 0, 5, 5, 7)], [0.8])
    found = select_instances(
        logits, embeds, features, STRIDE, SIZE, torch.tensor([box]), score_threshold=0.1, has_no_object=False
    )
    low, high = found["boxes"][:, :3], found["boxes"][:, 3:]
    assert ((low >= 0) & (low < high) & (high <= torch.tensor(SIZE))).all()


def test_empty_masks_and_unlikely_queries_are_no_instances():
    logits, embeds, features = scene([(0, 0, 0, 0, 0, 0), BLOCKS[0]], [0.9, 0.04])
    found = select_instances(logits, embeds, features, STRIDE, SIZE, score_threshold=0.05, has_no_object=False)
    assert found["boxes"].shape == (0, 6)
    assert [len(found[key]) for key in ("scores", "classes", "mask_logits")] == [0, 0, 0]


def test_zero_queries_and_more_than_a_chunk(monkeypatch):
    monkeypatch.setattr("seg3d_monai.heads.instance_masks.CHUNK", 400)  # two queries of 175 cells
    logits, embeds, features = scene(BLOCKS * 3, [0.5] * 9, classes=1)
    found = select_instances(logits, embeds, features, STRIDE, SIZE, score_threshold=0.1, has_no_object=False)
    assert len(found["scores"]) == 9
    none = select_instances(logits[:0], embeds[:0], features, STRIDE, SIZE, score_threshold=0.1, has_no_object=False)
    assert len(none["scores"]) == 0
