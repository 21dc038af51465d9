"""Detection heads: features -> logits, boxes from logits. No losses, no files."""

from seg3d_monai.heads.anchors import AnchorGrid
from seg3d_monai.heads.box_head import BoxHead, select_detections
from seg3d_monai.heads.mask_head import MaskHead
from seg3d_monai.heads.pixel_decoder import DeformablePixelDecoder
from seg3d_monai.heads.roi_pooler import RoIPooler
from seg3d_monai.heads.rpn import RPNHead, select_proposals
from seg3d_monai.heads.semantic_head import SemanticHead

__all__ = [
    "AnchorGrid",
    "BoxHead",
    "DeformablePixelDecoder",
    "MaskHead",
    "RPNHead",
    "RoIPooler",
    "SemanticHead",
    "select_detections",
    "select_proposals",
]
