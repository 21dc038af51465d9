"""Backbones: volume -> {level: features}. Must not know detectors, losses or data.

Every backbone has `channels: dict[str, int]` and `strides: dict[str, tuple[int, int, int]]`, finest level first.
"""

from seg3d_monai.backbones.fpn import FeaturePyramid
from seg3d_monai.backbones.resnet import ResNet, resnet_backbone

__all__ = ["FeaturePyramid", "ResNet", "resnet_backbone"]
