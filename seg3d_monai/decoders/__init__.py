"""Transformer decoders: memory and mask features -> classes, mask embeddings and boxes of queries. No losses."""

from seg3d_monai.decoders.denoising import Denoising
from seg3d_monai.decoders.mask2former import Mask2FormerDecoder
from seg3d_monai.decoders.maskdino import MaskDINODecoder

__all__ = ["Denoising", "Mask2FormerDecoder", "MaskDINODecoder"]
