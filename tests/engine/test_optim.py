"""Parameter groups: depths counted by hand from the names of each backbone, in all models; what weight decay spares."""

import re

import pytest
import torch
from engine_toys import ToyNetwork
from torch import nn

from seg3d_monai.backbones import ConvNeXt, FeaturePyramid, ResNet, Swin, ViT
from seg3d_monai.engine import parameter_groups
from seg3d_monai.models import mask2former3d, maskdino3d, maskrcnn3d

STRIDES = ((1, 1, 1), (1, 2, 2), (2, 2, 2))
STAGES = {"in_channels": 2, "depths": (1, 2, 1), "widths": (4, 8, 12), "stage_strides": STRIDES}
BACKBONES = {
    "resnet": lambda: ResNet(**STAGES, stem_channels=4),
    "convnext": lambda: ConvNeXt(**STAGES, kernel_size=(1, 3, 3)),
    "swin": lambda: Swin(
        in_channels=2, embed_channels=4, depths=(1, 2, 1), num_heads=(1, 2, 2), merge_strides=STRIDES[1:],
        window_size=(2, 3, 4),
    ),
    "vit": lambda: ViT(in_channels=2, channels=24, depth=3, num_heads=3, patch_size=(2, 4, 8)),
}  # fmt: skip
# For each backbone, beginnings of names from the image up; what begins otherwise is in no layer.
LAYERS = {
    "resnet": [r"stem\.", r"stages\.c1\.0\.", r"stages\.c2\.0\.", r"stages\.c2\.1\.", r"stages\.c3\.0\."],
    "convnext": [
        r"stem\.",
        r"stages\.c1\.0\.",
        r"stages\.c2\.0\.|shrink\.c2\.",
        r"stages\.c2\.1\.",
        r"stages\.c3\.0\.|shrink\.c3\.",
    ],
    "swin": [
        r"transformer\.patch_embed\.",
        r"transformer\.layers1\.0\.blocks\.0\.",
        r"transformer\.layers2\.0\.blocks\.0\.|merging\.c2\.",
        r"transformer\.layers2\.0\.blocks\.1\.",
        r"transformer\.layers3\.0\.blocks\.0\.|merging\.c3\.",
    ],
    "vit": [r"patches\.", r"blocks\.0\.", r"blocks\.1\.", r"blocks\.2\."],
}
TRANSFORMER = {
    "memory_levels": ("c2", "c3"), "hidden": 16, "mask_channels": 8, "encoder_layers": 1, "encoder_feedforward": 16,
    "decoder_layers": 1, "decoder_feedforward": 16, "num_queries": 3, "num_heads": 2,
}  # fmt: skip
MODELS = {
    "maskrcnn3d": lambda backbone: maskrcnn3d(
        backbone=backbone, anchor_shapes=[[[4, 6, 8]]], fpn_channels=8, box_hidden=16, mask_channels=8, mask_convs=1
    ),
    "maskdino3d": lambda backbone: maskdino3d(backbone=backbone, **TRANSFORMER, content_queries="learned"),
    "mask2former3d": lambda backbone: mask2former3d(backbone=backbone, **TRANSFORMER),
}


def settings_of(network, groups):
    """(learning rate, whether weight decay is left to the optimizer) of each name."""
    found = {}
    for group in groups:
        for parameter in group["params"]:
            (name,) = [name for name, other in network.named_parameters() if other is parameter]
            assert name not in found
            found[name] = (group["lr"], "weight_decay" not in group)
            assert group.get("weight_decay", 0.0) == 0.0
    assert found.keys() == dict(network.named_parameters()).keys()
    return found


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", BACKBONES)
def test_rates_fall_with_depth(kind, model):
    network = MODELS[model](BACKBONES[kind]())
    prefix = "backbone.backbone." if model == "maskrcnn3d" else "backbone."  # there inside a FeaturePyramid
    assert isinstance(network.backbone, FeaturePyramid) == (model == "maskrcnn3d")
    layers = LAYERS[kind]
    groups = parameter_groups(network, learning_rate=0.5, layer_decay=0.8)
    seen = set()
    for name, (rate, _) in settings_of(network, groups).items():
        own = name.removeprefix(prefix) if name.startswith(prefix) else ""
        (layer,) = [i for i, pattern in enumerate(layers) if re.match(pattern, own)] or [len(layers)]
        assert rate == pytest.approx(0.5 * 0.8 ** (len(layers) - layer)), name
        seen.add(layer)
    assert seen == set(range(len(layers) + 1))
    rates = [group["lr"] for group in groups]
    assert rates[0] == 0.5
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", BACKBONES)
def test_weight_decay_is_kept_to_linear_maps_and_convolutions(kind, model):
    network = MODELS[model](BACKBONES[kind]())
    maps = nn.Linear | nn.Conv3d | nn.ConvTranspose3d
    decayed = {id(module.weight) for module in network.modules() if isinstance(module, maps)}
    decayed |= {id(module.in_proj_weight) for module in network.modules() if isinstance(module, nn.MultiheadAttention)}
    groups = parameter_groups(network, learning_rate=0.5, decay_weights_only=True)
    assert len(groups) == 2
    settings = settings_of(network, groups)
    for name, parameter in network.named_parameters():
        assert settings[name] == (0.5, id(parameter) in decayed), name
    spared = [name for name, (_, is_decayed) in settings.items() if not is_decayed]
    if kind == "swin":
        assert any(name.endswith("relative_position_bias_table") for name in spared)
    if kind == "convnext":
        assert any(name.endswith(".scale") for name in spared)
    if model != "maskrcnn3d":
        assert "pixel_decoder.level_embeddings" in spared
        assert any(name.startswith("decoder.content") for name in spared)


def test_both_together():
    network = MODELS["mask2former3d"](BACKBONES["vit"]())
    groups = parameter_groups(network, learning_rate=1.0, layer_decay=0.5, decay_weights_only=True)
    settings = settings_of(network, groups)
    assert settings["backbone.patches.weight"] == (0.5**4, True)
    assert settings["backbone.patches.bias"] == (0.5**4, False)
    assert settings["backbone.blocks.2.norm1.weight"] == (0.5, False)
    assert settings["backbone.norm.weight"] == (1.0, False)
    assert settings["decoder.content"] == (1.0, False)


def test_without_options_it_is_the_plain_list_to_the_bit():
    networks, lists = [], []
    for grouped in (True, False):
        torch.manual_seed(3)
        network = MODELS["maskrcnn3d"](BACKBONES["resnet"]())
        parameters = parameter_groups(network, learning_rate=0.01) if grouped else network.parameters()
        optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            sum(p.sin().sum() for p in network.parameters()).backward()
            optimizer.step()
        networks.append(network)
        lists.append(optimizer.state_dict()["param_groups"])
    assert lists[0] == lists[1]
    for mine, other in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.equal(mine, other)


def test_frozen_and_shared_parameters():
    network = nn.Module()
    network.backbone = BACKBONES["vit"]()
    network.again = network.backbone.blocks[1]  # one layer, whatever it is called
    network.backbone.patches.requires_grad_(False)
    groups = parameter_groups(network, learning_rate=1.0, layer_decay=0.5)
    assert [group["lr"] for group in groups] == [1.0, 0.5, 0.25, 0.125]
    assert {id(p) for p in groups[2]["params"]} == {id(p) for p in network.again.parameters()}
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters())) - 2


def test_the_schedule_scales_every_group(make_trainer):
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "lr": lr} for lr in (1.0, 0.25)]
    optimizer = torch.optim.SGD(groups)
    trainer = make_trainer(schedule=lambda progress: 0.5, optimizer=lambda *_, **__: optimizer)
    trainer.run()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.125]


@pytest.mark.parametrize("decay", [0.0, 1.1, -0.5])
def test_refuses_a_decay(decay):
    with pytest.raises(ValueError, match=rf"layer_decay={decay} is not in \(0, 1\]"):
        parameter_groups(BACKBONES["vit"](), learning_rate=1.0, layer_decay=decay)


def test_refuses_a_network_that_cannot_tell_depths():
    with pytest.raises(ValueError, match=r"no part of ToyNetwork has a method layers_by_depth\(\)"):
        parameter_groups(ToyNetwork(), learning_rate=1.0, layer_decay=0.9)
    (group,) = parameter_groups(ToyNetwork(), learning_rate=1.0)
    assert len(group["params"]) == 2
