"""Pixel decoder: sizes, fusion counted by hand, padding, independence of the block's size, gradients."""

import pytest
import torch
from torch import nn

from seg3d_monai.heads import DeformablePixelDecoder
from seg3d_monai.heads.pixel_decoder import Fusion
from seg3d_monai.layers import PLACE_CHANNELS, place_features

CHANNELS = {"c1": 3, "c2": 4, "c3": 5, "c4": 6, "c5": 7}
STRIDES = {"c1": (1, 2, 2), "c2": (1, 4, 4), "c3": (2, 8, 8), "c4": (4, 8, 16), "c5": (4, 16, 32)}
SIZE = (6, 21, 35)


def cells(size, level):
    return tuple(-(-n // s) for n, s in zip(size, STRIDES[level], strict=True))


def features(size=SIZE, images=2, seed=0):
    torch.manual_seed(seed)
    return {level: torch.randn(images, c, *cells(size, level)) for level, c in CHANNELS.items()}


def build(memory=("c2", "c3", "c4"), mask=("c1",), seed=0, randomise=True, **changes):
    torch.manual_seed(seed)
    arguments = {"hidden": 16, "mask_channels": 6, "num_layers": 2, "num_heads": 4, "num_points": 2, "feedforward": 24}
    decoder = DeformablePixelDecoder(
        channels=CHANNELS, strides=STRIDES, memory_levels=memory, mask_levels=mask, **(arguments | changes)
    )
    if randomise:
        # Zero at first: attention that does not depend on its query yet.
        for layer in decoder.layers:
            for zeros in (layer.attention.offsets.weight, layer.attention.weights.weight):
                nn.init.normal_(zeros, std=0.2)
    return decoder


@pytest.mark.parametrize(
    ("memory", "mask"),
    [
        (["c4"], ["c1"]),
        (["c2", "c3"], ["c1"]),
        (["c3", "c4", "c5"], ["c1", "c2"]),
        (["c2", "c3", "c4", "c5"], ["c2"]),
    ],
)
def test_sizes_strides_and_flat_views(memory, mask):
    decoded = build(memory, mask)(features())
    assert decoded.strides == [STRIDES[level] for level in memory]
    assert decoded.sizes == [cells(SIZE, level) for level in memory]
    assert [tuple(m.shape) for m in decoded.memory] == [(2, 16, *size) for size in decoded.sizes]
    assert decoded.mask_features.shape == (2, 6 + PLACE_CHANNELS, *cells(SIZE, mask[0]))
    places = place_features(cells(SIZE, mask[0]), decoded.mask_stride, "cpu")
    assert torch.equal(decoded.mask_features[1, 6:], places.movedim(-1, 0))
    assert decoded.mask_stride == STRIDES[mask[0]]
    assert decoded.padding is None
    assert decoded.flat_padding is None
    row = 0
    for level, (d, h, w), stride in zip(decoded.memory, decoded.sizes, decoded.strides, strict=True):
        for z, y, x in ((0, 0, 0), (d - 1, 0, w - 1), (0, h - 1, 0)):
            here = row + (z * h + y) * w + x
            assert torch.equal(decoded.flat_memory[:, here], level[:, :, z, y, x])
            centre = [(c + 0.5) * s for c, s in zip((z, y, x), stride, strict=True)]
            assert decoded.centres[here].tolist() == centre
        row += d * h * w
    assert decoded.flat_memory.shape == (2, row, 16)
    assert decoded.centres.shape == (row, 3)


@pytest.mark.parametrize("ratio", [(1, 1, 1), (2, 2, 2), (1, 2, 4)])
@pytest.mark.parametrize("size", [(5, 7, 10), (1, 2, 3)])
def test_a_fine_cell_receives_the_coarse_cell_that_contains_it(ratio, size):
    torch.manual_seed(0)
    fusion = Fusion(in_channels=3, channels=3, ratio=ratio)
    fusion.lateral_norm = fusion.norm = nn.Identity()
    nn.init.eye_(fusion.lateral.weight)
    nn.init.dirac_(fusion.conv.weight)
    coarse = torch.rand(2, 3, *(-(-n // r) for n, r in zip(size, ratio, strict=True)))
    fine, padding = torch.rand(2, 3, *size), torch.rand(2, *size) < 0.3
    z, y, x = (torch.arange(n) // r for n, r in zip(size, ratio, strict=True))
    wanted = fine + coarse[:, :, z[:, None, None], y[:, None], x]
    torch.testing.assert_close(fusion(fine, coarse, None), wanted)
    torch.testing.assert_close(fusion(fine, coarse, padding), wanted * ~padding[:, None])


def test_cells_that_hold_no_valid_voxel_are_padding():
    decoded = build(["c2", "c3"], ["c1"])(features(), torch.tensor([[6, 21, 35], [3, 8, 17]]))
    assert not decoded.padding[0][0].any()
    assert not decoded.padding[1][0].any()
    # Of 3, 8, 17 voxels, cells of (1, 4, 4) begin in 3, 2, 5, and cells of (2, 8, 8) in 2, 1, 3.
    for padding, counts in zip(decoded.padding, ((3, 2, 5), (2, 1, 3)), strict=True):
        wanted = torch.ones(padding.shape[1:], dtype=torch.bool)
        wanted[: counts[0], : counts[1], : counts[2]] = False
        assert torch.equal(padding[1], wanted)
    assert torch.equal(decoded.flat_padding[1], torch.cat([p[1].flatten() for p in decoded.padding]))


VALID = [(6, 21, 35), (3, 8, 17), (5, 20, 9)]


@pytest.mark.parametrize(("memory", "mask"), [(["c2", "c3", "c4"], ["c1"]), (["c3", "c4"], ["c1", "c2"])])
def test_a_padded_image_gives_what_it_gives_alone(memory, mask):
    decoder = build(memory, mask)
    alone = [features(size, images=1, seed=i) for i, size in enumerate(VALID)]
    results = []
    for junk in (0.0, 1e3):
        padded = {level: torch.full((3, c, *cells(SIZE, level)), junk) for level, c in CHANNELS.items()}
        for n, own in enumerate(alone):
            for level, feature in own.items():
                d, h, w = feature.shape[2:]
                padded[level][n, :, :d, :h, :w] = feature[0]
        results.append(decoder(padded, torch.tensor(VALID)))
    for n, own in enumerate(alone):
        wanted = decoder(own)
        for level in range(len(memory)):
            d, h, w = wanted.sizes[level]
            found = [decoded.memory[level][n, :, :d, :h, :w] for decoded in results]
            assert torch.equal(*found)
            torch.testing.assert_close(found[0], wanted.memory[level][0], atol=1e-4, rtol=1e-4)
        d, h, w = wanted.mask_features.shape[2:]
        found = [decoded.mask_features[n, :, :d, :h, :w] for decoded in results]
        assert torch.equal(*found)
        torch.testing.assert_close(found[0], wanted.mask_features[0], atol=1e-4, rtol=1e-4)
    beyond = results[1].mask_features.clone()
    for n, size in enumerate(VALID):
        d, h, w = cells(size, "c1")
        beyond[n, :, :d, :h, :w] = 0
    assert not beyond.any()


def test_valid_sizes_of_whole_images_change_nothing():
    decoder, given = build(), features()
    wanted, found = decoder(given), decoder(given, torch.tensor([SIZE, SIZE]))
    for a, b in zip([*wanted.memory, wanted.mask_features], [*found.memory, found.mask_features], strict=True):
        assert torch.equal(a, b)


def test_a_cell_does_not_know_the_size_of_the_block():
    # One layer, directions as built: it reads at most two cells of the coarsest level, 32 voxels of x, to the side.
    decoder = build(["c2", "c3", "c4"], ["c1"], num_layers=1, randomise=False)
    small, large = features((6, 16, 64), images=1), features((6, 16, 160), images=1, seed=1)
    for level, feature in small.items():
        large[level][..., : feature.shape[-1]] = feature
    wanted, found = decoder(small), decoder(large)
    for a, b, stride in zip(wanted.memory, found.memory, wanted.strides, strict=True):
        inner = 16 // stride[2]
        torch.testing.assert_close(b[..., :inner], a[..., :inner], atol=1e-4, rtol=1e-4)
        assert not torch.isclose(b[..., a.shape[-1] - 1], a[..., -1], atol=1e-2).all()
    torch.testing.assert_close(found.mask_features[..., :6], wanted.mask_features[..., :6], atol=1e-4, rtol=1e-4)


def test_images_of_a_batch_are_independent():
    decoder, given = build(), features()
    both = decoder(given)
    for n in range(2):
        one = decoder({level: feature[n : n + 1] for level, feature in given.items()})
        torch.testing.assert_close(both.flat_memory[n : n + 1], one.flat_memory, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(both.mask_features[n : n + 1], one.mask_features, atol=1e-5, rtol=1e-5)


def gradients(decoder, given, valid=None, halved=False):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=halved):
        decoded = decoder(given, valid)
    (decoded.mask_features.float().pow(3).mean() + decoded.flat_memory.float().pow(3).mean()).backward()
    return {name: p.grad for name, p in decoder.named_parameters()}


@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("valid", [None, torch.tensor([[6, 21, 35], [3, 8, 17]])])
def test_gradient_reaches_every_parameter_and_level(valid, halved):
    decoder = build(["c3", "c4", "c5"], ["c1", "c2"])
    given = {level: feature.requires_grad_() for level, feature in features().items()}
    found = gradients(decoder, given, valid, halved)
    assert [name for name, g in found.items() if g is None or not g.any()] == []
    assert all(feature.grad.any() for feature in given.values())


def test_checkpointing_changes_no_gradient():
    plain, saving = build(), build(activation_checkpointing=True)
    given = features()
    wanted, found = gradients(plain, given), gradients(saving, given)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient)


def test_autocast():
    decoder, given = build(), features()
    wanted = decoder(given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = decoder(given, torch.tensor([SIZE, SIZE]))
    assert found.mask_features.dtype == torch.bfloat16
    assert found.mask_features.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(found.flat_memory.float(), wanted.flat_memory, atol=0.1, rtol=0.1)
    error = (found.mask_features.float() - wanted.mask_features).abs().mean()
    assert error < 0.03 * wanted.mask_features.abs().mean()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": []}, r"memory_levels is empty; choose from \['c1'"),
        ({"mask": ["c9"]}, r"mask_levels \['c9'\] are not levels of the backbone; choose from \['c1'"),
        ({"memory": ["c3", "c2"]}, r"strides of c3 \(2, 8, 8\) do not divide those of c2 \(1, 4, 4\).*finest first"),
        ({"memory": ["c2"], "mask": ["c3"]}, "strides of c3"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"hidden": 18}, "channels 18 is no multiple of num_heads 4"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)
