"""Backbones: volume -> {level: features}. Must not know detectors, losses or data.

Every backbone has `channels: dict[str, int]` and `strides: dict[str, tuple[int, int, int]]`, finest level first. Those
that see the image also have `layers_by_depth()`, their modules from the image up, which optimizers can ask for.
"""

from seg3d_monai.backbones.convnext import ConvNeXt, convnext_backbone
from seg3d_monai.backbones.fpn import FeaturePyramid
from seg3d_monai.backbones.resnet import ResNet, resnet_backbone
from seg3d_monai.backbones.swin import Swin, swin_backbone
from seg3d_monai.backbones.vit import ViT, vit_backbone

__all__ = [
    "ConvNeXt",
    "FeaturePyramid",
    "ResNet",
    "Swin",
    "ViT",
    "convnext_backbone",
    "resnet_backbone",
    "swin_backbone",
    "vit_backbone",
]
