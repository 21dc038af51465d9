"""The backbone of a pre-training as one tensor: what the backbone says, under the names of the network's weights."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from seg3d_monai.backbones import ViT, resnet_backbone
from seg3d_monai.export.features import BackboneFeatures
from seg3d_monai.models import masked_autoencoder3d

BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: resnet_backbone(depth=10, in_channels=1, width=4),
    "vit": lambda: ViT(in_channels=1, channels=16, depth=1, num_heads=2, patch_size=(2, 8, 8)),
}


@pytest.fixture(params=BACKBONES)
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    backbone = BACKBONES[request.param]()
    built = masked_autoencoder3d(
        backbone=backbone, decoder_channels=8, decoder_depth=1, decoder_heads=2, image_power=0.5
    )
    return built.eval()


def test_it_is_the_coarsest_level_of_the_whole_image(network: nn.Module) -> None:
    images = torch.rand(2, 1, 16, 32, 32)
    with torch.no_grad():
        found = BackboneFeatures(network)(images)
        backbone = network.backbone if hasattr(network, "hidden_token") else network.backbone.backbone
        wanted = backbone(network.image_power(images))
    assert torch.equal(found, wanted["c4"])
    assert torch.equal(found, BackboneFeatures(network)(images))  # nothing is drawn


def test_a_trace_gives_the_same_and_weights_fit(network: nn.Module) -> None:
    features = BackboneFeatures(network).eval()
    images = torch.rand(1, 1, 16, 32, 32)
    with torch.no_grad():
        traced = torch.jit.trace(features, images)
        torch.testing.assert_close(traced(images), features(images))
    assert features.state_dict().keys() == network.state_dict().keys()
    features.load_state_dict(network.state_dict())


def test_another_network_is_refused() -> None:
    with pytest.raises(TypeError, match="network is a Linear; give what masked_autoencoder3d builds"):
        BackboneFeatures(nn.Linear(1, 1))
