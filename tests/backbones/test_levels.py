"""What all backbones promise: levels, sizes, gradients, checkpointing, reduced precision, and a pyramid over them."""

import pytest
import torch
from backbone_toys import KINDS, toy, weighted_sum

from seg3d_monai.backbones import FeaturePyramid, convnext_backbone, resnet_backbone, swin_backbone, vit_backbone

LEVELS = {
    "resnet": ({"c1": 4, "c2": 6, "c3": 8}, {"c1": (1, 2, 2), "c2": (1, 4, 6), "c3": (2, 4, 12)}),
    "convnext": ({"c1": 4, "c2": 6, "c3": 8}, {"c1": (1, 2, 2), "c2": (1, 4, 6), "c3": (2, 4, 12)}),
    "swin": ({"c1": 4, "c2": 8, "c3": 16}, {"c1": (1, 2, 2), "c2": (1, 4, 6), "c3": (2, 4, 12)}),
    "vit": (
        {"c1": 6, "c2": 12, "c3": 24, "c4": 24},
        {"c1": (1, 1, 2), "c2": (1, 2, 4), "c3": (2, 4, 8), "c4": (4, 8, 16)},
    ),
}


def cells(size, stride):
    return tuple(-(-n // s) for n, s in zip(size, stride, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("size", "in_channels", "batch"), [((9, 17, 31), 1, 1), ((1, 1, 1), 3, 2), ((4, 8, 24), 3, 2), ((3, 5, 2), 1, 1)]
)
def test_every_level_has_ceil_of_size_over_its_stride(kind, size, in_channels, batch):
    network = toy(kind, in_channels=in_channels)
    assert (network.channels, network.strides) == LEVELS[kind]
    features = network(torch.randn(batch, in_channels, *size))
    assert list(features) == list(network.channels) == list(network.strides)
    for level, feature in features.items():
        assert feature.shape == (batch, network.channels[level], *cells(size, network.strides[level]))
        assert feature.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_parameter(kind):
    torch.manual_seed(0)
    network = toy(kind)
    weighted_sum(network(torch.randn(1, 2, 6, 9, 15))).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_features_and_gradients(kind):
    torch.manual_seed(0)
    plain, saving = toy(kind).double(), toy(kind, activation_checkpointing=True).double()
    saving.load_state_dict(plain.state_dict())
    image = torch.randn(2, 2, 5, 8, 13, dtype=torch.float64)
    kept = []
    for network in (plain, saving):
        count = 0

        def count_saved(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count_saved, lambda tensor: tensor):
            features = network(image)
        weighted_sum(features).backward()
        kept.append((count, features))
    for level, feature in kept[0][1].items():
        torch.testing.assert_close(kept[1][1][level], feature)
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=name)
    assert kept[1][0] < 0.7 * kept[0][0]
    with torch.no_grad():
        for a, b in zip(plain.eval()(image).values(), saving.eval()(image).values(), strict=True):
            torch.testing.assert_close(b, a)


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_a_batch_do_not_see_each_other(kind):
    torch.manual_seed(0)
    network = toy(kind).double()
    images = torch.randn(3, 2, 4, 7, 12, dtype=torch.float64)
    together = network(images)
    for n in range(3):
        for level, alone in network(images[n : n + 1]).items():
            torch.testing.assert_close(together[level][n : n + 1], alone)


@pytest.mark.parametrize("kind", KINDS)
def test_reduced_precision_stays_near(kind):
    torch.manual_seed(0)
    network = toy(kind)
    image = torch.randn(1, 2, 4, 7, 12)
    wanted = network(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network(image)
    for level, feature in wanted.items():
        torch.testing.assert_close(found[level].float(), feature, rtol=0.1, atol=0.15)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pyramid_stands_on_any_backbone(kind):
    torch.manual_seed(0)
    pyramid = FeaturePyramid(backbone=toy(kind), out_channels=5)
    for level in pyramid.levels:
        torch.nn.init.uniform_(pyramid.lateral[level][1].weight, 0.5, 1.5)
    out = pyramid(torch.randn(1, 2, 7, 9, 26))
    channels, strides = LEVELS[kind]
    assert pyramid.strides == {"p" + level[1:]: stride for level, stride in strides.items()}
    assert {level: tuple(f.shape) for level, f in out.items()} == {
        "p" + level[1:]: (1, 5, *cells((7, 9, 26), strides[level])) for level in channels
    }
    weighted_sum(out).backward()
    assert [name for name, p in pyramid.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    "build",
    [
        lambda: resnet_backbone(depth=18),
        lambda: swin_backbone(size="tiny"),
        lambda: vit_backbone(size="tiny"),
        lambda: convnext_backbone(size="tiny"),
    ],
    ids=KINDS,
)
def test_named_sizes_have_the_same_strides_so_that_one_replaces_another(build, cpu_linspace):
    with torch.device("meta"):
        network = build()
    assert network.strides == {"c1": (1, 2, 2), "c2": (2, 4, 4), "c3": (4, 8, 8), "c4": (8, 16, 16)}
