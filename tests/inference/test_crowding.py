"""Crowded blocks are halved until a detector of few queries sees few objects at a time."""

import logging
import re

import numpy as np
import pytest
import torch
from torch import nn

from seg3d_monai.data.intensity import Intensity
from seg3d_monai.inference import InstancePredictor
from seg3d_monai.inference.crowding import detect

SIZE = (6, 20, 64)


class PointDetector(nn.Module):
    """Finds bright voxels, the brightest first, at most `capacity` of them; each is a box of 3 x 3 x 3 voxels."""

    def __init__(self, capacity):
        super().__init__()
        self.capacity = capacity
        self.seen = []

    def forward(self, images):
        image = images[0, 0]
        self.seen.append(tuple(image.shape))
        places = (image > 0.5).nonzero()
        order = image[tuple(places.T)].argsort(descending=True)[: self.capacity]
        places = places[order]
        scores = image[tuple(places.T)]
        size = torch.tensor(image.shape)
        low, high = (places - 1).clamp(min=0), (places + 2).minimum(size)
        return [
            {
                "boxes": torch.cat([low, high], 1).float(),
                "scores": scores,
                "classes": torch.zeros(len(places), dtype=torch.int64),
                "mask_logits": [torch.full(extent, 4.0) for extent in (high - low).tolist()],
            }
        ]


def crowd(number, seed=0):
    """An image with `number` bright voxels on a grid of spacing 4, and their places."""
    grid = [(z, y, x) for z in (1, 4) for y in (2, 6, 10, 14, 18) for x in range(2, 64, 4)]
    order = torch.randperm(len(grid), generator=torch.Generator().manual_seed(seed))[:number].tolist()
    places = sorted(grid[i] for i in order)
    image = torch.zeros(1, *SIZE)
    for rank, place in enumerate(places):
        image[(0, *place)] = 0.6 + 0.3 * rank / max(len(places), 1)
    return image, places


def centres(found):
    boxes = found["boxes"]
    return sorted(tuple(c) for c in ((boxes[:, :3] + boxes[:, 3:] - 1) / 2).int().tolist())


@pytest.mark.parametrize("number", [0, 1, 7])
def test_what_fits_is_looked_at_once(number):
    image, places = crowd(number)
    network = PointDetector(10)
    assert centres(detect(network, image, capacity=10, score_threshold=0.5)) == places
    assert network.seen == [SIZE]


@pytest.mark.parametrize("number", [20, 40, 60])
def test_a_crowd_is_found_whole_without_duplicates(number):
    image, places = crowd(number)
    network = PointDetector(24)
    found = detect(network, image, capacity=24, score_threshold=0.5)
    assert centres(found) == places
    assert len(network.seen) > 1


def test_without_a_limit_nothing_is_split():
    image, places = crowd(120)
    network = PointDetector(1000)
    assert centres(detect(network, image, capacity=None, score_threshold=0.5)) == places
    assert network.seen == [SIZE]


def test_only_what_counts_makes_a_crowd():
    image, _ = crowd(9)
    network = PointDetector(10)
    detect(network, image, capacity=10, score_threshold=0.99)
    assert network.seen == [SIZE]


def test_a_crowd_too_dense_to_split_is_said(caplog):
    image = torch.full((1, 6, 8, 10), 0.9)  # 480 objects
    with caplog.at_level(logging.WARNING):
        network = PointDetector(10)
        found = detect(network, image, capacity=10, score_threshold=0.5)
    assert 10 <= len(found["scores"]) <= 80  # at most what eight parts can hold
    assert len(network.seen) == 1 + 2 + 4 + 8
    assert re.search(r"10 objects in a part of \d+x\d+x\d+ voxels, and the model has 10 queries", caplog.text)


def test_the_predictor_splits_by_itself():
    image, places = crowd(60)
    predictor = InstancePredictor(
        network=PointDetector(24), score_threshold=0.5, intensity=Intensity(low=(0.0,), high=(1.0,))
    )
    instances = predictor(image, (0, 0, 0, *SIZE))
    assert len(instances) == 60
    boxes = np.asarray(instances.boxes)
    assert sorted(map(tuple, ((boxes[:, :3] + boxes[:, 3:] - 1) // 2).astype(int).tolist())) == places
