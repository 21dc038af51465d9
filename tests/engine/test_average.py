"""The average against its formula written out, and against torch's AveragedModel."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from seg3d_monai.engine.average import WeightAverage


def test_follows_the_formula():
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = WeightAverage(network, 0.6)
    plain = AveragedModel(network, avg_fn=lambda a, b, n: a + (b - a) * (1 - min(0.6, (1 + int(n)) / (10 + int(n)))))
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        with torch.no_grad():
            for tensor in (*network.parameters(), network[1].running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        average.update()
        plain.update_parameters(network)
        assert average.steps == step + 1
        torch.testing.assert_close(average.module.state_dict(), plain.module.state_dict())
    assert all(a.requires_grad and a.grad is None for a in average.module.parameters())


def test_the_first_update_copies():
    network = nn.Linear(4, 3)
    average = WeightAverage(network, 0.99)
    nn.init.constant_(network.weight, 7.0)
    average.update()
    assert torch.equal(average.module.weight, network.weight)
