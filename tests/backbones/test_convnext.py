"""ConvNeXt: a block against its formula, published sizes, impossible arguments."""

import pytest
import torch
from backbone_toys import toy
from torch import nn

from seg3d_monai.backbones import convnext_backbone
from seg3d_monai.backbones.convnext import ConvNeXtBlock


def test_a_block_is_the_formula_of_the_paper():
    torch.manual_seed(0)
    block = ConvNeXtBlock(3, (1, 3, 5), 0.5).double()
    nn.init.uniform_(block.norm.weight)
    nn.init.uniform_(block.scale)
    x = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    padded = nn.functional.pad(x, (2, 2, 1, 1))
    mixed = torch.zeros_like(x) + block.depthwise.bias.view(3, 1, 1, 1)
    for j in range(3):
        for k in range(5):
            mixed += block.depthwise.weight[:, 0, 0, j, k].view(3, 1, 1, 1) * padded[..., j : j + 5, k : k + 6]
    mean, var = mixed.mean(1, keepdim=True), mixed.var(1, keepdim=True, unbiased=False)
    normed = (mixed - mean) / (var + 1e-6).sqrt() * block.norm.weight.view(3, 1, 1, 1)
    hidden = torch.einsum("oc,nczyx->nozyx", block.expand.weight, normed) + block.expand.bias.view(12, 1, 1, 1)
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    added = torch.einsum("oc,nczyx->nozyx", block.project.weight, hidden) + block.project.bias.view(3, 1, 1, 1)
    torch.testing.assert_close(block(x), x + block.scale.view(3, 1, 1, 1) * added)


def test_a_block_that_is_scaled_by_nothing_is_the_identity():
    x = torch.randn(2, 4, 3, 5, 7)
    assert torch.equal(ConvNeXtBlock(4, (3, 3, 3), 0.0)(x), x)


def test_levels_are_normalised_over_their_channels():
    torch.manual_seed(0)
    for feature in toy("convnext")(torch.randn(1, 2, 4, 9, 13)).values():
        torch.testing.assert_close(feature.mean(1), torch.zeros(feature[:, 0].shape), atol=1e-5, rtol=0)
        torch.testing.assert_close(feature.var(1, unbiased=False), torch.ones(feature[:, 0].shape), atol=1e-3, rtol=0)


def parameters(depths, width, *, taps, stem_taps, cell):
    """Stem and its norm, the norms and convolutions between stages, and the blocks, counted by hand."""
    total = stem_taps * width + width + 2 * width
    for i, depth in enumerate(depths):
        c = width * 2**i
        if i:
            total += 2 * (c // 2) + cell * (c // 2) * c + c
        total += depth * ((taps + 1) * c + 2 * c + (4 * c * c + 4 * c) + (4 * c * c + c) + c)
    return total


# Blocks, channels, and what torchvision documents for the same size in 2D with 1000 classes.
@pytest.mark.parametrize(
    ("size", "depths", "width", "published"),
    [
        ("tiny", (3, 3, 9, 3), 96, 28589128),
        ("small", (3, 3, 27, 3), 96, 50223688),
        ("base", (3, 3, 27, 3), 128, 88591464),
    ],
)
def test_named_sizes_have_the_published_parameters(size, depths, width, published):
    head = 2 * 8 * width + 8 * width * 1000 + 1000
    assert parameters(depths, width, taps=7 * 7, stem_taps=3 * 4 * 4, cell=4) + head == published
    with torch.device("meta"):
        network = convnext_backbone(size=size, in_channels=2, kernel_size=(3, 5, 7))
    found = sum(p.numel() for p in network.parameters())
    assert found == parameters(depths, width, taps=3 * 5 * 7, stem_taps=2 * 3 * 4 * 4, cell=8)
    assert list(network.channels.values()) == [width * 2**i for i in range(4)]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"depths": (1, 1)}, "depths"),
        ({"depths": (1, 0, 1)}, "depths"),
        ({"kernel_size": (2, 4, 4)}, "kernel_size"),
        ({"kernel_size": (3, 3)}, "kernel_size"),
        ({"stem_stride": (1, 2)}, "stem_stride"),
        ({"stage_strides": ((1, 1, 1), (0, 2, 2), (2, 2, 2))}, "stage_strides"),
    ],
)
def test_impossible_arguments_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        toy("convnext", **changes)


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="size is 'huge'; choose one of tiny, small, base"):
        convnext_backbone(size="huge")
