"""Patches: which voxels a cell sees, and a norm of single cells."""

import pytest
import torch

from seg3d_monai.backbones.patches import PatchConv, pad_to_multiple
from seg3d_monai.layers import ChannelNorm


@pytest.mark.parametrize("overlap", [0, 1, 2])
@pytest.mark.parametrize("size", [(3, 7, 10), (1, 1, 1), (2, 6, 12)])
def test_a_cell_sees_its_own_voxels_and_the_overlap(overlap, size):
    stride = (1, 2, 3)
    conv = PatchConv(1, 1, stride, overlap)
    torch.nn.init.ones_(conv.weight)
    torch.nn.init.zeros_(conv.bias)
    image = torch.rand(2, 1, *size)
    out = conv(image)
    counts = [-(-n // s) for n, s in zip(size, stride, strict=True)]
    assert out.shape == (2, 1, *counts)
    for cell in torch.cartesian_prod(*(torch.arange(n) for n in counts)).tolist():
        window = tuple(slice(max(j * s - overlap, 0), (j + 1) * s + overlap) for j, s in zip(cell, stride, strict=True))
        z, y, x = cell
        torch.testing.assert_close(out[:, 0, z, y, x], image[:, 0][(slice(None), *window)].sum((1, 2, 3)))


def test_zeros_are_added_at_the_upper_ends_only():
    image = torch.rand(1, 2, 3, 4, 5)
    padded = pad_to_multiple(image, (2, 4, 3))
    assert padded.shape == (1, 2, 4, 4, 6)
    assert torch.equal(padded[:, :, :3, :, :5], image)
    assert padded.sum() == pytest.approx(float(image.sum()))
    assert pad_to_multiple(image, (3, 2, 5)) is image


def test_the_norm_looks_at_one_cell():
    torch.manual_seed(0)
    norm = ChannelNorm(4, 1e-6)
    torch.nn.init.uniform_(norm.weight)
    torch.nn.init.uniform_(norm.bias)
    x = torch.randn(2, 4, 3, 5, 2) * 3 + 1
    mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    wanted = (x - mean) / (var + 1e-6).sqrt() * norm.weight.view(4, 1, 1, 1) + norm.bias.view(4, 1, 1, 1)
    torch.testing.assert_close(norm(x), wanted)
