"""Detectors: the wiring of backbone, heads and matching, and their named sizes."""

from seg3d_monai.models.builders import maskrcnn3d, maskrcnn3d_r50, maskrcnn3d_r101, maskrcnn3d_tiny
from seg3d_monai.models.mask_rcnn import MaskRCNN3d

__all__ = ["MaskRCNN3d", "maskrcnn3d", "maskrcnn3d_r50", "maskrcnn3d_r101", "maskrcnn3d_tiny"]
