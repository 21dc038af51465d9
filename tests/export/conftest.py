"""Small networks of the bundles, their configurations, and weights as a training writes them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser
from small_networks import SMALL_NETWORK
from torch import nn

from seg3d_monai.engine.checkpoint import write_weights

ROOT = Path(__file__).parents[2]
BUNDLES = ["maskrcnn3d", "maskdino3d", "mask2former3d"]
FEWER = {"backbone#width": 8, "network_def#encoder_layers": 1, "network_def#decoder_layers": 2}
"""Over `SMALL_NETWORK`: exporters take seconds a layer."""


def changes(bundle: str) -> dict[str, object]:
    """Keys that make a bundle's network small."""
    layers = FEWER if bundle != "maskrcnn3d" else {"backbone#width": 8}
    return SMALL_NETWORK[bundle] | layers


def build(bundle: str, seed: int = 0, **more: object) -> nn.Module:
    """A bundle's network, small, its weights scattered so that scores and masks differ from place to place."""
    parser = ConfigParser()
    parser.read_config(str(ROOT / "bundles" / bundle / "configs" / "inference.json"))
    for key, value in (changes(bundle) | more).items():
        parser[key] = value
    torch.manual_seed(seed)
    network: nn.Module = parser.get_parsed_content("network_def")
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1 and ("class_logits" in name or "objectness" in name or "deltas" in name):
                parameter.normal_(std=0.2)
            elif name.endswith("weight") and parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return network.eval()


@pytest.fixture
def small() -> Callable[..., nn.Module]:
    """`build`."""
    return build


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Weights of a bundle's small network, model.pt, and the overlay that makes its configuration that small."""

    def write(bundle: str, seed: int = 0) -> tuple[Path, Path]:
        weights, overlay = tmp_path / "model.pt", tmp_path / "small.json"
        write_weights(weights, build(bundle, seed).state_dict(), [2.0, 0.8, 0.8])
        overlay.write_text(json.dumps(changes(bundle)))
        return weights, overlay

    return write
