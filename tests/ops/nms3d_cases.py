"""Boxes for the tests of non-maximum suppression on every device, in groups and without."""

import naive_oracle
import pytest
import torch


def crowd(count, seed=0, spread=(10.0, 30.0, 40.0)):
    """Anisotropic boxes that overlap, a tenth of them empty or inverted, with tied scores and groups of any id."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 3, generator=generator) * torch.tensor(spread)
    extent = torch.tensor([2.0, 6.0, 8.0]) * (0.3 + torch.rand(count, 3, generator=generator))
    extent[::10, 1] = 0.0
    extent[5::20, 2] = -1.0
    scores = torch.randint(0, max(count // 3, 1), (count,), generator=generator) / 100.0
    group = (torch.randint(0, 3, (count,), generator=generator) - 1) * 2**40
    return torch.cat([low, low + extent], 1), scores, group


def chain(count, axis):
    """Boxes in a row, each over the threshold 0.5 with its neighbours only, of descending score: the worst case."""
    low = torch.zeros(count, 3)
    low[:, axis] = torch.arange(count) * 0.25 * (2.0, 3.0, 4.0)[axis]
    return torch.cat([low, low + torch.tensor([2.0, 3.0, 4.0])], 1), -torch.arange(count).float(), None


def clusters(count, seed=1):
    """Many boxes around few places: all in a cluster suppress one another."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randint(0, 3, (count, 1), generator=generator) * 40.0
    low = centre + torch.randn(count, 3, generator=generator)
    return torch.cat([low, low + 16], 1), torch.rand(count, generator=generator), None


def one_long(count):
    boxes, scores, group = crowd(count, seed=8)
    boxes[count // 2] = torch.tensor([0.0, 0.0, -500.0, 12.0, 36.0, 500.0])
    scores[count // 2] = 100.0
    return boxes, scores, group


CASES = {
    "crowd": crowd(150),
    "many": crowd(600, seed=4, spread=(40.0, 60.0, 90.0)),
    "chain-z": chain(90, 0),
    "chain-x": chain(90, 2),
    "clusters": clusters(200),
    "one long": one_long(120),
    "one": crowd(1),
    "two": (torch.tensor([[0, 0, 0, 2, 3, 4.0]] * 2), torch.tensor([0.5, 0.5]), None),
}
nms_cases = pytest.mark.parametrize("case", CASES)


def kept(boxes, scores, group, threshold):
    return naive_oracle.nms(boxes, scores, [0] * len(boxes) if group is None else group.tolist(), threshold)
