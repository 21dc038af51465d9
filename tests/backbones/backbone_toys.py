"""A small backbone of each kind, with another kernel, stride and window on each axis, to be permuted at will."""

import torch
from torch import nn

from seg3d_monai.backbones import ConvNeXt, ResNet, Swin, ViT

STRIDES = ((1, 1, 1), (1, 2, 3), (2, 1, 2))
KINDS = ("resnet", "swin", "vit", "convnext")


def toy(kind: str, axes: tuple[int, ...] = (0, 1, 2), **changes) -> nn.Module:
    """A network of two channels in, float32, whose blocks all contribute.

    Args:
        kind: one of KINDS.
        axes: order of the axes of its kernels, strides and windows.
        changes: arguments that replace its own.
    """

    def permuted(values):
        return tuple(values[a] for a in axes)

    strides = [permuted(s) for s in STRIDES]
    if kind == "resnet":
        own = {
            "depths": (1, 2, 1),
            "widths": (4, 6, 8),
            "stem_channels": 4,
            "stem_kernel": permuted((1, 3, 5)),
            "stem_stride": permuted((1, 2, 2)),
            "stage_strides": strides,
        }
        network = ResNet(**({"in_channels": 2} | own | changes))
    elif kind == "convnext":
        own = {
            "depths": (1, 2, 1),
            "widths": (4, 6, 8),
            "kernel_size": permuted((1, 3, 5)),
            "stem_stride": permuted((1, 2, 2)),
            "stage_strides": strides,
            "layer_scale": 0.7,
        }
        network = ConvNeXt(**({"in_channels": 2} | own | changes))
    elif kind == "swin":
        own = {
            "embed_channels": 4,
            "depths": (1, 2, 2),
            "num_heads": (1, 2, 4),
            "patch_size": permuted((1, 2, 2)),
            "merge_strides": strides[1:],
            "window_size": permuted((2, 3, 4)),
        }
        network = Swin(**({"in_channels": 2} | own | changes))
    else:
        own = {"channels": 24, "depth": 2, "num_heads": 3, "patch_size": permuted((2, 4, 8))}
        network = ViT(**({"in_channels": 2} | own | changes))
    for layer in network.modules():
        # Residual blocks start with a scale of zero, transformers with tiny weights: both would hide what is inside.
        if isinstance(layer, nn.GroupNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.2, 0.2)
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return network


def weighted_sum(features: dict[str, torch.Tensor]) -> torch.Tensor:
    """A scalar that weighs each value differently; a plain sum of normalised maps has no gradient."""
    generator = torch.Generator().manual_seed(5)
    return sum((f * torch.randn(f.shape, generator=generator).to(f.dtype)).sum() for f in features.values())
