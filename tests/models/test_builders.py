"""Named sizes: every parameter is trained, levels fit, errors name what is wrong."""

import pytest
import torch

from seg3d_monai.losses import MaskRCNNCriterion
from seg3d_monai.matching import IoUMatcher
from seg3d_monai.models import maskrcnn3d, maskrcnn3d_r50, maskrcnn3d_r101, maskrcnn3d_tiny


def test_every_parameter_of_the_tiny_model_has_a_gradient(make_target):
    """Data-parallel training stops at a parameter that no loss reaches."""
    torch.manual_seed(0)
    size = (17, 33, 49)
    network = maskrcnn3d_tiny(in_channels=2, num_classes=2)
    targets = [make_target(size, [(2, 4, 6, 12, 18, 20), (3, 18, 22, 11, 32, 40)], classes=[0, 1])]
    matcher = IoUMatcher(foreground_iou=0.4, background_iou=0.2, match_best=True)
    losses = MaskRCNNCriterion(matcher=matcher)(network(torch.randn(1, 2, *size), targets), targets)
    sum(losses.values()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_tiny_model_detects(make_target):
    network = maskrcnn3d_tiny(num_classes=2).eval()
    with torch.inference_mode():
        (found,) = network(torch.randn(1, 1, 17, 33, 49))
    assert found["mask_logits"].shape == (len(found["boxes"]), 12, 24, 24)


@pytest.mark.parametrize(("build", "blocks"), [(maskrcnn3d_r50, 16), (maskrcnn3d_r101, 33)])
def test_large_models_are_wired_to_their_levels(build, blocks):
    with torch.device("meta"):
        network = build(in_channels=3, num_classes=5)
    assert sum(len(stage) for stage in network.backbone.backbone.stages.values()) == blocks
    assert network.anchors.strides == {"p1": (1, 2, 2), "p2": (2, 4, 4), "p3": (4, 8, 8)}
    assert network.rpn.levels == list(network.anchors.strides) == list(network.box_pooler.strides)
    assert network.box_head.class_logits.out_features == 6
    assert network.mask_head.logits.out_channels == 5
    # ResNet (47 or 85 million in 3D), pyramid (about 8), heads (256 * 343 * 1024 alone is 90), mask head (7).
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    assert 140 < millions < 210


def test_more_anchor_shapes_than_levels_is_refused(make_detector):
    with pytest.raises(ValueError, match="anchor shapes"):
        make_detector(anchor_shapes=[[(4, 6, 6)]] * 3)


@pytest.mark.parametrize("argument", ["anchor_levels", "mask_levels"])
def test_unknown_levels_are_named(make_detector, argument):
    with pytest.raises(ValueError, match=rf"{argument} \['p7'\].*choose from \['p1', 'p2'\]"):
        make_detector(anchor_shapes=[[(4, 6, 6)]], **{argument: ["p7"]})


def test_any_backbone_with_channels_and_strides_serves():
    class Pool(torch.nn.Module):
        channels = {"c1": 1, "c2": 1}  # noqa: RUF012
        strides = {"c1": (1, 2, 3), "c2": (1, 4, 6)}  # noqa: RUF012

        def forward(self, images):
            pool = torch.nn.functional.avg_pool3d
            return {k: pool(images, s, s, ceil_mode=True) for k, s in self.strides.items()}

    network = maskrcnn3d(
        backbone=Pool(),
        anchor_shapes=[[(4, 6, 9)], [(4, 12, 18)]],
        fpn_channels=4,
        box_roi_size=(2, 2, 2),
        box_hidden=4,
        mask_roi_size=(2, 3, 4),
        mask_channels=4,
        mask_convs=1,
        score_threshold=0.0,
    ).eval()
    (found,) = network(torch.randn(1, 1, 5, 21, 34))
    assert found["mask_logits"].shape[1:] == (4, 6, 8)
    assert (found["boxes"] <= torch.tensor([5, 21, 34, 5, 21, 34])).all()
