"""No axis of a transformer is taken for another: permuted image, kernels and strides give permuted boxes and masks.

Sines of places fill blocks of channels, one an axis, which permuted axes exchange. They are added to memory and
queries, so a network that does the same in permuted axes has the channels of all of these in the other order; what it
says of classes and masks is the same. tests/backbones/test_axis_permutation.py is of backbones and the RPN.
"""

import re

import pytest
import torch

from seg3d_monai.backbones import ResNet
from seg3d_monai.models import mask2former3d, maskdino3d

ORDERS = [(2, 0, 1), (1, 0, 2)]
HIDDEN = 28
"""Channels of memory and queries: three blocks of 8 and 4 without a place."""
SIZE = (7, 26, 36)
VALID = [SIZE, (5, 26, 21)]
BOXES = [[[0, 2, 3, 4, 15, 12], [1, 11, 20, 6, 26, 33]], [[0, 3, 1, 5, 9, 19]]]
SETTINGS = {
    "num_classes": 2,
    "memory_levels": ("c2", "c3"),
    "mask_levels": ("c1",),
    "hidden": HIDDEN,
    "mask_channels": 6,
    "encoder_layers": 2,
    "encoder_feedforward": 10,
    "decoder_layers": 3,
    "decoder_feedforward": 10,
    "num_queries": 9,
    "num_heads": 2,
    "num_points": 3,
    "score_threshold": 0.0,
}
KINDS = {
    "maskdino-selected": (maskdino3d, {"denoising_queries": 6, "box_noise": 0.0, "label_noise": 0.0}),
    "maskdino-learned": (maskdino3d, {"content_queries": "learned", "box_from_mask": False, "denoising_queries": 0}),
    "mask2former-selected": (mask2former3d, {"query_source": "selected"}),
    "mask2former-learned": (mask2former3d, {"query_source": "learned"}),
}
"""Denoising without noise has nothing drawn in it."""

AXES = {
    r"(offsets|shift)\.(weight|bias)": 1,
    r"box_deltas\.layers\.2\.(weight|bias)": 1,
    r"gains\.(weight|bias)": 6,
    r"free_places\.(weight|bias)": 12,
}
"""Parameters whose rows speak of axes: channels that each axis has in a row of blocks, of wavelengths or of one."""
WRITE = (
    r"(projections\.c\d|project)\.0\.(weight|bias)",
    r"(lateral|output|reduce)\.(weight|bias)",
    r"positions?\.layers\.1\.(weight|bias)",
    r"norm\.(weight|bias)|lateral_norm\.(weight|bias)|(projections\.c\d|project)\.1\.(weight|bias)",
    r"fusions\.c\d\.conv\.weight",
)
"""Parameters whose rows are channels of memory or queries; and those whose columns are, of inputs or as vectors."""
READ = (
    r"(offsets|weights|value|query|key)\.weight",
    r"(expand|mask_projection|class_logits|gains|shift|free_places)\.weight",
    r"project\.0\.weight",
    r"(mask_embeds|box_deltas|decoder\.selection\.positions)\.layers\.0\.weight",
    r"fusions\.c\d\.conv\.weight",
    r"level_embeddings|label_embedding\.weight|content\.weight|decoder\.content|decoder\.positions",
)


def turned_channels(axes, count, block):
    """Where channels come from: repeated triples of blocks, one block an axis, then what belongs to no axis."""
    index = torch.arange(count)
    whole = count // (3 * block) * 3 * block
    return torch.cat([index[:whole].view(-1, 3, block)[:, list(axes)].flatten(), index[whole:]])


def turned_parameters(state, axes):
    """The weights of a network for the permuted axes; each parameter is either known here or speaks of no place."""

    def names(key, patterns):
        return next((p for p in patterns if re.search(rf"(^|\.)({p})$", key)), None)

    hidden = turned_channels(axes, HIDDEN, HIDDEN // 6 * 2)
    turned = {}
    for key, value in state.items():
        if value.ndim == 5:
            value = value.permute(0, 1, *(a + 2 for a in axes))
        if key.startswith(("pixel_decoder.", "decoder.")):
            if found := names(key, AXES):
                value = value[turned_channels(axes, len(value), AXES[found])]
            if names(key, WRITE):
                value = value[hidden]
            if names(key, READ):
                value = value[..., hidden] if value.ndim < 5 else value[:, hidden]
            if re.search(r"decoder\.position\.layers\.0\.weight$", key):  # sines of centres, then of extents
                value = value[:, turned_channels(axes, value.shape[1], value.shape[1] // 12 * 2)]
        turned[key] = value
    return turned


def network_of(kind, axes=(0, 1, 2)):
    def permuted(values):
        return tuple(values[a] for a in axes)

    backbone = ResNet(
        in_channels=2,
        depths=(1, 1, 1),
        widths=(4, 6, 8),
        stem_channels=4,
        stem_kernel=permuted((1, 3, 5)),
        stem_stride=permuted((1, 2, 2)),
        stage_strides=[permuted(s) for s in ((1, 1, 1), (1, 2, 3), (2, 1, 2))],
    )
    build, settings = KINDS[kind]
    return build(backbone=backbone, **(SETTINGS | settings)).double()


def stirred(network):
    """The same network without weights that are zero or alike, which would hide a permutation."""
    for parameter in network.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * (0.5 * parameter.std(correction=0) + 0.05))
    return network


def turned_targets(axes):
    index = [*axes, *(a + 3 for a in axes)]
    boxes = [torch.tensor(b, dtype=torch.float32)[:, index] for b in BOXES]
    return [{"boxes": b, "classes": torch.arange(len(b)) % 2} for b in boxes]


def outputs_of(network, images, axes):
    decoded = network.pixel_decoder(network.backbone(images), torch.tensor(VALID)[:, list(axes)])
    return network.decoder(decoded, turned_targets(axes))


def mask_logits(outputs, part):
    features = outputs["mask_features"]
    return torch.einsum("lnqc,nczyx->lnqzyx", part["mask_embeds"].to(features), features)


@pytest.mark.parametrize("axes", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_permuted(kind, axes):
    torch.manual_seed(0)
    network, turned = stirred(network_of(kind)), network_of(kind, axes)
    turned.load_state_dict(turned_parameters(network.state_dict(), axes))
    images = torch.randn(2, 2, *SIZE, dtype=torch.float64)
    order = (0, 1, *(a + 2 for a in axes))
    wanted, found = outputs_of(network, images, (0, 1, 2)), outputs_of(turned, images.permute(order), axes)

    assert found["names"] == wanted["names"]
    assert found["mask_stride"] == tuple(wanted["mask_stride"][a] for a in axes)
    parts = [(wanted, found)]
    if "denoising" in wanted:
        parts.append((wanted["denoising"], found["denoising"]))
    assert len(parts) == 1 + (kind == "maskdino-selected")
    # Boxes and class logits are float32, whatever the image is.
    close = {"rtol": 1e-5, "atol": 1e-5}
    for part, other in parts:
        torch.testing.assert_close(other["class_logits"], part["class_logits"], **close)
        if "boxes" in part:
            boxes = part["boxes"].unflatten(-1, (2, 3))[..., list(axes)].flatten(-2)
            torch.testing.assert_close(other["boxes"], boxes, **close)
        masks = mask_logits(wanted, part).permute(0, 1, 2, *(a + 3 for a in axes))
        torch.testing.assert_close(mask_logits(found, other), masks, **close)
        for axis in range(3):
            assert not torch.allclose(masks, masks.flip(3 + axis), atol=0.1), "masks that cannot tell axes apart"


@pytest.mark.parametrize("axes", ORDERS)
@pytest.mark.parametrize("kind", ["maskdino-selected", "mask2former-selected"])
def test_instances_are_permuted(kind, axes):
    torch.manual_seed(0)
    network, turned = stirred(network_of(kind)).eval(), network_of(kind, axes).eval()
    turned.load_state_dict(turned_parameters(network.state_dict(), axes))
    images = torch.randn(1, 2, *SIZE, dtype=torch.float64)
    with torch.inference_mode():
        (wanted,), (found,) = network(images), turned(images.permute(0, 1, *(a + 2 for a in axes)))
    assert len(wanted["boxes"]) > 2
    torch.testing.assert_close(found["boxes"], wanted["boxes"].unflatten(-1, (2, 3))[..., list(axes)].flatten(-2))
    torch.testing.assert_close(found["scores"], wanted["scores"])
    assert found["classes"].tolist() == wanted["classes"].tolist()
    for mask, other in zip(wanted["mask_logits"], found["mask_logits"], strict=True):
        torch.testing.assert_close(other, mask.permute(axes), rtol=1e-4, atol=1e-4)
