"""A very small detector and targets of box-shaped instances."""

import pytest
import torch
from torch import nn

from seg3d_monai.backbones import ResNet
from seg3d_monai.models import maskrcnn3d


@pytest.fixture
def make_detector():
    """Build a detector of 8 channels with two levels, p1 of stride (1, 2, 2) and p2 of stride (2, 4, 4)."""

    def build(in_channels=1, num_classes=1, seed=0, **changes):
        torch.manual_seed(seed)
        backbone = ResNet(
            in_channels=in_channels,
            depths=(1, 1),
            widths=(8, 16),
            stem_channels=8,
            stage_strides=((1, 1, 1), (2, 2, 2)),
        )
        arguments = {
            "anchor_shapes": [[(4, 6, 6), (6, 8, 8)], [(8, 12, 12), (10, 16, 16)]],
            "fpn_channels": 8,
            "box_roi_size": (3, 3, 3),
            "box_hidden": 16,
            "mask_roi_size": (4, 4, 4),
            "mask_channels": 8,
            "mask_convs": 1,
            "pre_nms_top_n": (100, 200),
            "post_nms_top_n": (50, 100),
            "score_threshold": 0.0,
            "max_detections": 40,
        }
        network = maskrcnn3d(backbone=backbone, num_classes=num_classes, **(arguments | changes))
        for layer in network.modules():
            if isinstance(layer, nn.GroupNorm):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
        for layer in (
            network.rpn.objectness,
            network.rpn.deltas,
            network.box_head.class_logits,
            network.box_head.deltas,
        ):
            nn.init.normal_(layer.weight, std=0.1)
        return network

    return build


@pytest.fixture
def make_target():
    """Targets of instances that fill boxes [G, 6] of integers."""

    def build(size, boxes, classes=None, ids=None):
        ids = list(range(1, len(boxes) + 1)) if ids is None else ids
        label = torch.zeros(size, dtype=torch.int64)
        for (z1, y1, x1, z2, y2, x2), number in zip(boxes, ids, strict=True):
            label[z1:z2, y1:y2, x1:x2] = number
        return {
            "label": label,
            "ids": torch.tensor(ids, dtype=torch.int64),
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 6),
            "classes": torch.tensor(classes or [0] * len(boxes), dtype=torch.int64),
        }

    return build
