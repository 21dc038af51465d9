"""No axis is taken for another: permuted image, kernels, strides and windows give permuted maps and boxes."""

import pytest
import torch
from backbone_toys import toy
from torch import nn

from seg3d_monai.backbones import FeaturePyramid
from seg3d_monai.heads import AnchorGrid, RPNHead, select_proposals

ORDERS = [(2, 0, 1), (1, 0, 2)]
SHAPES = [[(2, 4, 6), (4, 6, 5)], [(3, 8, 10), (4, 9, 16)]]


def turn(axes, *groups):
    """Positions of permuted coordinates: of three axes, or of groups of three."""
    return [3 * g + a for g in groups for a in axes]


def turned_weights(state, axes, network):
    """The weights of a network for the permuted axes."""
    turned = {}
    for key, value in state.items():
        if value.ndim == 5:
            value = value.permute(0, 1, *(a + 2 for a in axes))
        elif key.endswith("relative_position_bias_table"):
            extents = [2 * w - 1 for w in network.window_size]
            value = value.unflatten(0, extents).permute(*axes, 3).flatten(0, 2)
        elif ".merging." in f".{key}":
            stride = network.merging[key.split(".")[1]].stride
            # The last axis runs over the cells of a patch, then over channels.
            value = value.unflatten(-1, (*stride, -1))
            lead = list(range(value.ndim - 4))
            value = value.permute(*lead, *(len(lead) + a for a in axes), value.ndim - 1).flatten(-4)
        if key.startswith("deltas."):  # each anchor's six rows: three of the centre, three of the extent
            value = value.unflatten(0, (-1, 6))[:, turn(axes, 0, 1)].flatten(0, 1)
        if not key.endswith("relative_position_index"):
            turned[key] = value
    return turned


@pytest.mark.parametrize("axes", ORDERS)
@pytest.mark.parametrize("kind", ["resnet", "convnext", "swin"])
def test_backbones(kind, axes):
    torch.manual_seed(0)
    network = toy(kind).double()
    turned = toy(kind, axes).double()
    missing, unexpected = turned.load_state_dict(turned_weights(network.state_dict(), axes, network), strict=False)
    assert not unexpected
    assert all(key.endswith("relative_position_index") for key in missing)
    order = (0, 1, *(a + 2 for a in axes))
    image = torch.randn(1, 2, 5, 9, 31, dtype=torch.float64)
    wanted, found = network(image), turned(image.permute(order))
    for level in wanted:
        torch.testing.assert_close(found[level], wanted[level].permute(order))


@pytest.mark.parametrize("axes", ORDERS)
@pytest.mark.parametrize("kind", ["resnet", "convnext"])
def test_from_the_image_to_the_proposals(kind, axes):
    torch.manual_seed(0)

    def detector(order):
        pyramid = FeaturePyramid(backbone=toy(kind, order), out_channels=4)
        head = RPNHead(in_channels=4, num_anchors=2, levels=["p1", "p2"])
        shapes = [[tuple(shape[a] for a in order) for shape in level] for level in SHAPES]
        strides = {level: pyramid.strides[level] for level in head.levels}
        return pyramid.double(), head.double(), AnchorGrid(shapes=shapes, strides=strides)

    pyramid, head, anchors = detector((0, 1, 2))
    for layer in [*pyramid.modules(), *head.modules()]:
        if isinstance(layer, nn.GroupNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.normal_(head.deltas.weight, std=0.3)
    nn.init.normal_(head.objectness.weight)
    other_pyramid, other_head, other_anchors = detector(axes)
    other_pyramid.load_state_dict(turned_weights(pyramid.state_dict(), axes, pyramid.backbone))
    other_head.load_state_dict(turned_weights(head.state_dict(), axes, head))

    size = (5, 12, 22)
    image = torch.randn(1, 2, *size, dtype=torch.float64)
    order = (0, 1, *(a + 2 for a in axes))
    features, other_features = pyramid(image), other_pyramid(image.permute(order))
    for level in features:
        torch.testing.assert_close(other_features[level], features[level].permute(order))

    objectness, deltas = head(features)
    other_objectness, other_deltas = other_head(other_features)
    for i, level in enumerate(head.levels):
        cells, other_cells = features[level].shape[2:], other_features[level].shape[2:]
        wanted = objectness[i].view(*cells, 2).permute(*axes, 3)
        torch.testing.assert_close(other_objectness[i].view(*other_cells, 2), wanted)
        wanted = deltas[i].view(*cells, 2, 6).permute(*axes, 3, 4)[..., turn(axes, 0, 1)]
        torch.testing.assert_close(other_deltas[i].view(*other_cells, 2, 6), wanted)

    limits = {"pre_nms_top_n": 60, "post_nms_top_n": 20, "nms_threshold": 0.5}
    (boxes,) = select_proposals(objectness, deltas, anchors(features), size, **limits)
    other_size = [size[a] for a in axes]
    (other_boxes,) = select_proposals(
        other_objectness, other_deltas, other_anchors(other_features), other_size, **limits
    )
    assert len(boxes) > 5
    torch.testing.assert_close(other_boxes, boxes[:, turn(axes, 0, 1)])
