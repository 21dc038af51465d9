"""ResNet: sizes and strides per axis, axis permutation, gradients, checkpointing, published depths."""

import pytest
import torch
from torch import nn

from seg3d_monai.backbones import ResNet, resnet_backbone
from seg3d_monai.backbones.resnet import Residual

STRIDES = ((1, 1, 1), (1, 2, 3), (2, 1, 2))


def small(**changes):
    arguments = {
        "in_channels": 2,
        "depths": (1, 2, 1),
        "widths": (4, 6, 8),
        "stem_channels": 4,
        "stem_kernel": (1, 3, 5),
        "stem_stride": (1, 2, 2),
        "stage_strides": STRIDES,
    }
    return ResNet(**(arguments | changes))


def randomise_norms(module):
    """The zero scale that a residual block starts with hides everything inside of it."""
    for layer in module.modules():
        if isinstance(layer, nn.GroupNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.2, 0.2)


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("size", [(9, 17, 31), (1, 1, 1), (4, 12, 24)])
def test_every_level_has_ceil_of_size_over_its_stride(bottleneck, size):
    net = small(bottleneck=bottleneck, widths=(16, 16, 16), stem_channels=16)
    features = net(torch.randn(1, 2, *size))
    assert list(features) == list(net.channels) == list(net.strides) == ["c1", "c2", "c3"]
    assert net.strides == {"c1": (1, 2, 2), "c2": (1, 4, 6), "c3": (2, 4, 12)}
    assert set(net.channels.values()) == {64 if bottleneck else 16}
    for level, feature in features.items():
        wanted = tuple(-(-n // s) for n, s in zip(size, net.strides[level], strict=True))
        assert feature.shape == (1, net.channels[level], *wanted)


@pytest.mark.parametrize("axes", [(2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("bottleneck", [False, True])
def test_permuting_axes_of_input_kernels_and_strides_permutes_the_features(axes, bottleneck):
    torch.manual_seed(0)

    def permuted(values):
        return tuple(values[a] for a in axes)

    net = small(bottleneck=bottleneck).double()
    randomise_norms(net)
    turned = small(
        bottleneck=bottleneck,
        stem_kernel=permuted((1, 3, 5)),
        stem_stride=permuted((1, 2, 2)),
        stage_strides=[permuted(s) for s in STRIDES],
    ).double()
    order = (0, 1, *(a + 2 for a in axes))
    turned.load_state_dict({k: v.permute(order) if v.ndim == 5 else v for k, v in net.state_dict().items()})
    image = torch.randn(1, 2, 5, 9, 14, dtype=torch.float64)
    wanted, found = net(image), turned(image.permute(order))
    for level in wanted:
        torch.testing.assert_close(found[level], wanted[level].permute(order))


def test_a_fresh_block_of_equal_shape_is_the_identity_on_activations():
    x = torch.rand(2, 8, 3, 5, 7)
    torch.testing.assert_close(Residual(8, 8, (1, 1, 1), False)(x), x)
    torch.testing.assert_close(Residual(8, 2, (1, 1, 1), True)(x), x)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_gradient_reaches_every_parameter(bottleneck):
    torch.manual_seed(0)
    net = small(bottleneck=bottleneck)
    randomise_norms(net)
    net(torch.randn(1, 2, 6, 9, 15))["c3"].square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_checkpointing_gives_the_same_features_and_gradients():
    torch.manual_seed(0)
    plain, saving = small().double(), small(activation_checkpointing=True).double()
    randomise_norms(plain)
    saving.load_state_dict(plain.state_dict())
    image = torch.randn(2, 2, 5, 8, 13, dtype=torch.float64)
    for net in (plain, saving):
        sum(f.square().sum() for f in net(image).values()).backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=name)
    for a, b in zip(plain(image).values(), saving(image).values(), strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize(
    ("depth", "blocks", "expansion", "convs"),
    # Convolutions of He et al. 2016, table 1, without the classifier: weighted layers + projection shortcuts.
    [
        (10, (1, 1, 1, 1), 1, 9 + 3),
        (18, (2, 2, 2, 2), 1, 17 + 3),
        (34, (3, 4, 6, 3), 1, 33 + 3),
        (50, (3, 4, 6, 3), 4, 49 + 4),
        (101, (3, 4, 23, 3), 4, 100 + 4),
    ],
)
def test_named_sizes_have_the_published_depth(depth, blocks, expansion, convs):
    with torch.device("meta"):
        net = resnet_backbone(depth=depth, in_channels=3, width=64)
    assert tuple(len(stage) for stage in net.stages.values()) == blocks
    assert list(net.channels.values()) == [64 * 2**i * expansion for i in range(4)]
    assert net.strides == {"c1": (1, 2, 2), "c2": (2, 4, 4), "c3": (4, 8, 8), "c4": (8, 16, 16)}
    assert sum(isinstance(m, nn.Conv3d) for m in net.modules()) == convs


@pytest.mark.parametrize(("depth", "blocks"), [(50, (3, 4, 6, 3)), (101, (3, 4, 23, 3))])
def test_number_of_parameters_counted_by_hand(depth, blocks):
    with torch.device("meta"):
        net = resnet_backbone(depth=depth, in_channels=1, width=64)
    stem = 3 * 5 * 5 * 64 + 2 * 64
    total, inputs = stem, 64
    for i, count in enumerate(blocks):
        width = 64 * 2**i
        for j in range(count):
            inner = inputs * width + 27 * width**2 + width * 4 * width + 2 * (width + width + 4 * width)
            total += inner + (inputs * 4 * width + 2 * 4 * width if j == 0 else 0)
            inputs = 4 * width
    assert sum(p.numel() for p in net.parameters()) == total


def test_an_unknown_depth_is_refused():
    with pytest.raises(ValueError, match="depth is 20; choose one of 10, 18"):
        resnet_backbone(depth=20)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"depths": (1, 1)}, "depths"),
        ({"stage_strides": STRIDES[:2]}, "stage_strides"),
        ({"stem_stride": (1, 2)}, "stem_stride"),
        ({"stage_strides": ((1, 1, 1), (0, 2, 2), (2, 2, 2))}, "stage_strides"),
        ({"stem_kernel": (2, 4, 4)}, "kernel"),
        ({"depths": (1, 0, 1)}, "depths"),
    ],
)
def test_impossible_arguments_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        small(**changes)
