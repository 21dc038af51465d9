"""Building blocks shared by backbones, heads and decoders. Must not know what a detector is."""

from seg3d_monai.layers.cell_linear import CellLinear
from seg3d_monai.layers.conv import Conv3d, ConvNormAct, group_norm
from seg3d_monai.layers.deformable_attention import DeformableAttention3d
from seg3d_monai.layers.image_power import ImagePower
from seg3d_monai.layers.mlp import MLP
from seg3d_monai.layers.norm import BatchNorm, CellNorm, ChannelNorm, GroupNorm, LayerNorm
from seg3d_monai.layers.pixel_decoder_output import PixelDecoderOutput
from seg3d_monai.layers.place_kernel import PLACE_CHANNELS, PlaceEmbedding, place_features
from seg3d_monai.layers.pooling import pool_to_levels
from seg3d_monai.layers.position import level_centres, level_positions, sine_positions
from seg3d_monai.layers.transformer import CrossAttention, FeedForward, SelfAttention
from seg3d_monai.layers.upsample import repeat_cells

__all__ = [
    "MLP",
    "PLACE_CHANNELS",
    "BatchNorm",
    "CellLinear",
    "CellNorm",
    "ChannelNorm",
    "Conv3d",
    "ConvNormAct",
    "CrossAttention",
    "DeformableAttention3d",
    "FeedForward",
    "GroupNorm",
    "ImagePower",
    "LayerNorm",
    "PixelDecoderOutput",
    "PlaceEmbedding",
    "SelfAttention",
    "group_norm",
    "level_centres",
    "level_positions",
    "place_features",
    "pool_to_levels",
    "repeat_cells",
    "sine_positions",
]
