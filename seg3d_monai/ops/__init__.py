"""Operators on 3D boxes and feature volumes. Importing this loads their library, or compiles it the first time."""

from seg3d_monai.ops.group_norm import group_norm
from seg3d_monai.ops.label_extents import LabelExtents, label_extents
from seg3d_monai.ops.label_pairs import label_pairs
from seg3d_monai.ops.layer_norm import layer_norm
from seg3d_monai.ops.mask_targets3d import mask_targets3d
from seg3d_monai.ops.match_boxes3d import match_boxes3d
from seg3d_monai.ops.ms_deform_attn3d import ms_deform_attn3d
from seg3d_monai.ops.nms3d import batched_nms3d, nms3d
from seg3d_monai.ops.paste_masks3d import paste_masks3d
from seg3d_monai.ops.registration import status
from seg3d_monai.ops.roi_align3d import roi_align3d

__all__ = [
    "LabelExtents",
    "batched_nms3d",
    "group_norm",
    "label_extents",
    "label_pairs",
    "layer_norm",
    "mask_targets3d",
    "match_boxes3d",
    "ms_deform_attn3d",
    "nms3d",
    "paste_masks3d",
    "roi_align3d",
    "status",
]
