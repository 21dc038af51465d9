"""Swin: windows and shifts counted by hand, positions in small levels, merging, published sizes."""

import math

import pytest
import torch
from backbone_toys import toy
from torch import nn

from seg3d_monai.backbones import Swin, swin_backbone
from seg3d_monai.backbones.swin import PatchMerging


def one_stage(depth, window_size, channels=4, heads=1):
    network = Swin(
        in_channels=1,
        embed_channels=channels,
        depths=(depth,),
        num_heads=(heads,),
        patch_size=(1, 1, 1),
        merge_strides=(),
        window_size=window_size,
    )
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return network


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_windows_are_joined_by_the_shifted_ones(axis):
    """Twelve cells, windows of four: 0-3, 4-7, 8-11; shifted by two: 0-1, 2-5, 6-9, 10-11."""
    torch.manual_seed(0)
    size, window, place = [1, 1, 1], [1, 1, 1], [0, 0, 0]
    size[axis], window[axis], place[axis] = 12, 4, 1
    image = torch.randn(1, 1, *size)
    changed = image.clone()
    changed[0, 0, place[0], place[1], place[2]] += 1
    for depth, reached in [(1, [0, 1, 2, 3]), (2, [0, 1, 2, 3, 4, 5]), (3, list(range(8)))]:
        network = one_stage(depth, window)
        before, after = (network(v)["c1"].flatten(2)[0] for v in (image, changed))
        assert ((before - after).abs() > 1e-6).any(0).nonzero().flatten().tolist() == reached


@pytest.mark.parametrize("size", [(2, 3, 4), (1, 2, 3), (2, 1, 1), (2, 2, 4)])
def test_attention_in_a_level_smaller_than_the_window(size):
    """Against the formula: each pair of cells has the bias of its displacement; cells of the padding hold zeros."""
    torch.manual_seed(0)
    window = (2, 3, 4)
    network = one_stage(1, window, channels=6, heads=2).double()
    block = network.transformer.layers1[0].blocks[0]
    nn.init.normal_(block.attn.relative_position_bias_table)
    image = torch.randn(1, 1, *size, dtype=torch.float64)
    patches = network.transformer.patch_embed(image)[0].movedim(0, -1)

    cells = [(z, y, x) for z in range(2) for y in range(3) for x in range(4)]
    inside = [all(c < n for c, n in zip(cell, size, strict=True)) for cell in cells]
    x = torch.zeros(24, 6, dtype=torch.float64)
    x[inside] = patches.flatten(0, 2)
    query, key, value = (block.attn.qkv(block.norm1(x))).chunk(3, -1)
    table = block.attn.relative_position_bias_table
    mixed = []
    for h in range(2):
        own = slice(3 * h, 3 * h + 3)
        logits = query[:, own] @ key[:, own].T / math.sqrt(3)
        for i, a in enumerate(cells):
            for j, b in enumerate(cells):
                dz, dy, dx = (p - q + w - 1 for p, q, w in zip(a, b, window, strict=True))
                logits[i, j] += table[(dz * 5 + dy) * 7 + dx, h]
        mixed.append(logits.softmax(1) @ value[:, own])
    y = x + block.attn.proj(torch.cat(mixed, 1))
    y = y + block.mlp(block.norm2(y))
    wanted = nn.functional.layer_norm(y, (6,))[inside].T
    torch.testing.assert_close(network(image)["c1"][0].flatten(1), wanted)


@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 1, 3), (2, 2, 2)])
def test_merging_joins_the_cells_of_a_patch(stride):
    torch.manual_seed(0)
    merging = PatchMerging(3, stride)
    x = torch.randn(2, 3, 5, 4, 3)
    out = merging(x)
    counts = [-(-n // s) for n, s in zip(x.shape[1:4], stride, strict=True)]
    assert out.shape == (2, *counts, 6)
    for z, y, w in torch.cartesian_prod(*(torch.arange(n) for n in counts)).tolist():
        patch = torch.zeros(2, *stride, 3)
        low = z * stride[0], y * stride[1], w * stride[2]
        part = x[:, low[0] : low[0] + stride[0], low[1] : low[1] + stride[1], low[2] : low[2] + stride[2]]
        patch[:, : part.shape[1], : part.shape[2], : part.shape[3]] = part
        torch.testing.assert_close(out[:, z, y, w], merging.reduction(merging.norm(patch.flatten(1))))


def test_levels_are_normalised_over_their_channels():
    torch.manual_seed(0)
    for feature in toy("swin")(torch.randn(1, 2, 4, 9, 13)).values():
        torch.testing.assert_close(feature.mean(1), torch.zeros(feature[:, 0].shape), atol=1e-5, rtol=0)
        torch.testing.assert_close(feature.var(1, unbiased=False), torch.ones(feature[:, 0].shape), atol=1e-3, rtol=0)


def parameters(width, depths, heads, *, patch_voxels, cell, biases):
    """Patches and their norm, mergings, and blocks with their tables of relative positions, counted by hand."""
    total = patch_voxels * width + width + 2 * width
    for i, (depth, head) in enumerate(zip(depths, heads, strict=True)):
        c = width * 2**i
        if i:
            total += 2 * cell * (c // 2) + cell * (c // 2) * c
        attention = (3 * c * c + 3 * c) + (c * c + c) + biases * head
        mlp = (4 * c * c + 4 * c) + (4 * c * c + c)
        total += depth * (attention + mlp + 4 * c)
    return total


# Channels, blocks, heads, and what torchvision documents for the same size in 2D with 1000 classes.
@pytest.mark.parametrize(
    ("size", "width", "depths", "heads", "published"),
    [
        ("tiny", 96, (2, 2, 6, 2), (3, 6, 12, 24), 28288354),
        ("small", 96, (2, 2, 18, 2), (3, 6, 12, 24), 49606258),
        ("base", 128, (2, 2, 18, 2), (4, 8, 16, 32), 87768224),
    ],
)
def test_named_sizes_have_the_published_parameters(size, width, depths, heads, published, cpu_linspace):
    head = 2 * 8 * width + 8 * width * 1000 + 1000
    assert parameters(width, depths, heads, patch_voxels=3 * 4 * 4, cell=4, biases=13 * 13) + head == published
    with torch.device("meta"):
        network = swin_backbone(size=size, in_channels=2, window_size=(2, 4, 6))
    found = sum(p.numel() for p in network.parameters())
    assert found == parameters(width, depths, heads, patch_voxels=2 * 4, cell=8, biases=3 * 7 * 11)
    assert list(network.channels.values()) == [width * 2**i for i in range(4)]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"depths": (1, 1)}, "depths"),
        ({"depths": (1, 0, 1)}, "depths"),
        ({"num_heads": (1, 2, 3)}, "num_heads"),
        ({"merge_strides": ((2, 2, 2),)}, "merge_strides"),
        ({"merge_strides": ((2, 2), (2, 2))}, "merge_strides"),
        ({"patch_size": (1, 2)}, "patch_size"),
        ({"window_size": (0, 2, 2)}, "window_size"),
    ],
)
def test_impossible_arguments_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        toy("swin", **changes)


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="size is 'huge'; choose one of tiny, small, base"):
        swin_backbone(size="huge")
