"""ViT: a block against its formula, places that levels see, positions in voxels, published sizes."""

import math

import pytest
import torch
from backbone_toys import toy
from torch import nn

from seg3d_monai.backbones import ViT, vit_backbone
from seg3d_monai.backbones.vit import ViTBlock


def test_a_block_is_the_formula_of_the_paper():
    torch.manual_seed(0)
    block = ViTBlock(6, 2).double()
    for norm in (block.norm1, block.norm2):
        nn.init.uniform_(norm.weight)
        nn.init.uniform_(norm.bias)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    for n in range(2):
        tokens = block.norm1(x[n])
        parts = zip(block.qkv.weight.chunk(3), block.qkv.bias.chunk(3), strict=True)
        query, key, value = (tokens @ weight.T + bias for weight, bias in parts)
        heads = []
        for h in (slice(0, 3), slice(3, 6)):
            logits = query[:, h] @ key[:, h].T / math.sqrt(3)
            weights = logits.exp() / logits.exp().sum(1, keepdim=True)
            heads.append(weights @ value[:, h])
        y = x[n] + torch.cat(heads, 1) @ block.project.weight.T + block.project.bias
        hidden = block.norm2(y) @ block.expand.weight.T + block.expand.bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        torch.testing.assert_close(block(x)[n], y + hidden @ block.contract.weight.T + block.contract.bias)


@pytest.mark.parametrize("patch_size", [(2, 4, 8), (1, 3, 6)])
def test_without_attention_a_cell_depends_on_the_patches_that_it_lies_in_or_covers(patch_size):
    torch.manual_seed(0)
    network = ViT(in_channels=1, channels=12, depth=1, num_heads=2, patch_size=patch_size)
    nn.init.zeros_(network.blocks[0].project.weight)
    size = (5, 11, 21)
    image = torch.randn(1, 1, *size)
    voxel = (2, 6, 17)
    changed = image.clone()
    changed[0, 0, voxel[0], voxel[1], voxel[2]] += 3
    before, after = network(image), network(changed)
    for level, stride in network.strides.items():
        differs = ((before[level] - after[level]).abs() > 1e-6).any(1)[0].nonzero()
        low = [v // p * p for v, p in zip(voxel, patch_size, strict=True)]
        high = [min(v + p, n) for v, p, n in zip(low, patch_size, size, strict=True)]
        assert differs.amin(0).tolist() == [v // s for v, s in zip(low, stride, strict=True)]
        assert differs.amax(0).tolist() == [(v - 1) // s for v, s in zip(high, stride, strict=True)]


def test_an_axis_grows_no_further_than_its_patch_divides():
    strides = toy("vit", patch_size=(1, 6, 16)).strides
    assert strides == {"c1": (1, 3, 4), "c2": (1, 3, 8), "c3": (1, 6, 16), "c4": (2, 12, 32)}


def test_tokens_know_their_place_in_voxels():
    """Sines, then cosines, of each axis, at four wavelengths from two patches to 1024 voxels."""
    network = toy("vit")
    network.blocks, network.norm = nn.ModuleList(), nn.Identity()
    for size in [(4, 8, 16), (6, 20, 24)]:
        tokens = network(torch.ones(1, 2, *size))["c3"][0]
        embedded = network.patches(torch.ones(1, 2, *size))[0]
        z, y, x = 1, 1, 1
        wanted = []
        for centre in ((z + 0.5) * 2, (y + 0.5) * 4, (x + 0.5) * 8):
            angles = [2 * math.pi * centre / (16 * 64 ** (i / 3)) for i in range(4)]
            wanted += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close((tokens - embedded)[:, z, y, x], torch.tensor(wanted), atol=1e-5, rtol=1e-4)


def parameters(channels, depth, patch_voxels):
    """Patches, blocks and last norm, counted by hand."""
    c = channels
    attention = (3 * c * c + 3 * c) + (c * c + c)
    mlp = (4 * c * c + 4 * c) + (4 * c * c + c)
    return patch_voxels * c + c + depth * (attention + mlp + 4 * c) + 2 * c


# Channels, blocks, heads, and what timm (tiny, small) and torchvision document in 2D with 1000 classes.
@pytest.mark.parametrize(
    ("size", "channels", "depth", "heads", "published"),
    [
        ("tiny", 192, 12, 3, 5717416),
        ("small", 384, 12, 6, 22050664),
        ("base", 768, 12, 12, 86567656),
        ("large", 1024, 24, 16, 304326632),
    ],
)
def test_named_sizes_have_the_published_parameters(size, channels, depth, heads, published):
    class_token_positions_and_head = channels + (14 * 14 + 1) * channels + channels * 1000 + 1000
    assert parameters(channels, depth, 3 * 16 * 16) + class_token_positions_and_head == published
    with torch.device("meta"):
        network = vit_backbone(size=size, in_channels=2)
    half, quarter = channels // 2, channels // 4
    c1 = (8 * channels * half + half) + 2 * half + (8 * half * quarter + quarter)
    pyramid = c1 + 8 * channels * half + half
    assert sum(p.numel() for p in network.parameters()) == parameters(channels, depth, 2 * 4 * 8 * 8) + pyramid
    assert {block.num_heads for block in network.blocks} == {heads}
    assert list(network.channels.values()) == [quarter, half, channels, channels]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"channels": 20}, "channels is 20"),
        ({"channels": 18, "num_heads": 3}, "channels is 18"),
        ({"depth": 0}, "depth is 0"),
        ({"patch_size": (2, 4)}, "patch_size"),
    ],
)
def test_impossible_arguments_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        toy("vit", **changes)


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="size is 'huge'; choose one of tiny, small, base, large"):
        vit_backbone(size="huge")
