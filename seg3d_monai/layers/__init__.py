"""Building blocks shared by backbones, heads and decoders. Must not know what a detector is."""

from seg3d_monai.layers.conv import ConvNormAct, group_norm

__all__ = ["ConvNormAct", "group_norm"]
