"""Attentions for the tests of the CUDA kernels, with true results from the naive loops and gradients by grid_sample."""

import math
from dataclasses import dataclass

import naive_oracle
import pytest
import torch


@dataclass(frozen=True)
class Attention:
    """Shapes of one call; the values are drawn from its fields alone."""

    shapes: tuple[tuple[int, int, int], ...] = ((3, 4, 5), (2, 1, 3))
    num_images: int = 2
    num_queries: int = 7
    heads: int = 3
    channels: int = 8
    points: int = 2

    def __str__(self):
        counts = (self.num_images, self.num_queries, self.heads, self.channels, len(self.shapes), self.points)
        return "-".join(f"{name}{count}" for name, count in zip("nqmclp", counts, strict=True))

    def tensors(self):
        """value, locations, weights in float64; some samples lie outside, on the border, at NaN or very far away."""
        generator = torch.Generator().manual_seed(0)
        samples = (self.num_images, self.num_queries, self.heads, len(self.shapes), self.points)
        num_values = sum(math.prod(shape) for shape in self.shapes)
        value = torch.randn(
            (self.num_images, num_values, self.heads, self.channels), generator=generator, dtype=torch.float64
        )
        locations = torch.rand((*samples, 3), generator=generator, dtype=torch.float64) * 1.5 - 0.25
        flat = locations.view(-1, 3)
        strange = [0.0, 1.0, math.nan, 1e30, -1e30, math.inf]
        for place, number in zip(range(0, len(flat), 5), strange, strict=False):
            flat[place, place % 3] = number
        return value, locations, torch.rand(samples, generator=generator, dtype=torch.float64)

    def grad(self):
        shape = (self.num_images, self.num_queries, self.heads * self.channels)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def attended(self, value, locations, weights):
        arrays = (tensor.double().numpy() for tensor in (locations, weights))
        return torch.from_numpy(naive_oracle.ms_deform_attn(value.double().numpy(), self.shapes, *arrays))

    def gradients(self, grad, value, locations, weights):
        """Of value, locations and weights, by autograd through torch's own sampling in float64."""
        leaves = [tensor.double().requires_grad_() for tensor in (value, locations, weights)]
        output = attend_by_grid_sample(leaves[0], self.shapes, *leaves[1:])
        return torch.autograd.grad(output, leaves, grad.double())


def attend_by_grid_sample(value, shapes, locations, weights):
    n, _, m, channels = value.shape
    total = 0
    levels = value.split([math.prod(shape) for shape in shapes], 1)
    for level, (rows, shape) in enumerate(zip(levels, shapes, strict=True)):
        volume = rows.permute(0, 2, 3, 1).reshape(n * m, channels, *shape)
        # grid_sample turns NaN and far coordinates into numbers of its own; two voxels outside stand for them.
        where = locations[:, :, :, level].nan_to_num(-2, 3, -2).clamp(-2, 3)
        grid = (where.flip(-1) * 2 - 1).transpose(1, 2).flatten(0, 1)[:, None]
        sampled = torch.nn.functional.grid_sample(volume, grid, align_corners=False, padding_mode="zeros")[:, :, 0]
        shares = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)
        total = total + (sampled * shares[:, None]).sum(-1)
    return total.reshape(n, m, channels, -1).permute(0, 3, 1, 2).flatten(2)


ATTENTIONS = [
    Attention(),
    Attention(channels=5),  # rows that no vector load fits
    Attention(((1, 1, 1),), 1, 1, 1, 1, 1),
    Attention(((2, 6, 3),) * 3, 1, 5, 2, 32, 4),
    Attention(((2, 3, 4),), 1, 3, 1, 160, 1),  # more channels than a warp takes at once
    Attention(((1, 3, 2),) * 16, 1, 2, 2, 4, 1),  # as many levels as there can be
]
attentions = pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
