"""Backbones: volume -> {level: features}. Must not know detectors, losses or data.

Every backbone has `channels: dict[str, int]` and `strides: dict[str, tuple[int, int, int]]`, finest level first.
"""

from seg3d_monai.backbones.fpn import FeaturePyramid
from seg3d_monai.backbones.resnet import ResNet, resnet10, resnet18, resnet34, resnet50, resnet101

__all__ = ["FeaturePyramid", "ResNet", "resnet10", "resnet18", "resnet34", "resnet50", "resnet101"]
