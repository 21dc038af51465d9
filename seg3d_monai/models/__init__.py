"""Detectors, and their pre-training: the wiring of backbone, heads, decoders and matching, and their named sizes."""

from seg3d_monai.models.builders import maskrcnn3d, maskrcnn3d_r50, maskrcnn3d_r101, maskrcnn3d_tiny
from seg3d_monai.models.mask_rcnn import MaskRCNN3d
from seg3d_monai.models.mask_transformer import MaskTransformer3d
from seg3d_monai.models.mask_transformer_builders import (
    mask2former3d,
    mask2former3d_r50,
    mask2former3d_tiny,
    maskdino3d,
    maskdino3d_r50,
    maskdino3d_tiny,
)
from seg3d_monai.models.masked_autoencoder import InpaintingAutoencoder, TokenAutoencoder, masked_autoencoder3d

__all__ = [
    "InpaintingAutoencoder",
    "MaskRCNN3d",
    "MaskTransformer3d",
    "TokenAutoencoder",
    "mask2former3d",
    "mask2former3d_r50",
    "mask2former3d_tiny",
    "maskdino3d",
    "maskdino3d_r50",
    "maskdino3d_tiny",
    "masked_autoencoder3d",
    "maskrcnn3d",
    "maskrcnn3d_r50",
    "maskrcnn3d_r101",
    "maskrcnn3d_tiny",
]
