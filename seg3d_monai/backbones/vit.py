"""Plain Vision Transformer (Dosovitskiy et al. 2021) with the simple feature pyramid of ViTDet (Li et al. 2022), in 3D.

All blocks attend to the whole volume, so that memory for the tokens grows with the volume and time with its square:
predict in blocks about as large as the training crops. MONAI's and torch's blocks were not taken: the former has a norm
that nothing reads, whose gradient never comes, the latter's fast path keeps the matrix of all pairs of tokens on CPUs.
"""

from collections.abc import Mapping, Sequence
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seg3d_monai.backbones.patches import PatchConv
from seg3d_monai.backbones.resnet import Axes
from seg3d_monai.layers import ChannelNorm, LayerNorm
from seg3d_monai.layers.conv import check_axes
from seg3d_monai.layers.position import level_centres, sine_positions


class ViTBlock(nn.Module):
    """Self-attention, then an MLP, each behind a LayerNorm and added to its input.

    Args:
        channels: channels of a token, a multiple of `num_heads`.
        num_heads: attention heads.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = LayerNorm(channels, eps=1e-6)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(channels, channels)
        self.norm2 = LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, 4 * channels)
        self.contract = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [N, L, channels] -> the same."""
        # [N, L, 3 * channels] -> query, key and value, each [N, num_heads, L, channels / num_heads]
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.project(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        x = x + self.contract(F.gelu(self.expand(self.norm2(x))))
        return x


class ViT(nn.Module):
    """Vision Transformer for volumes, with four levels made of its last map.

    c3 is the map of the patches. c2 and c1 are grown from it by two and by four with transposed convolutions, c4 is
    c3 pooled by two. An axis grows no further than its patch divides: a patch of (2, 8, 8) gives the strides
    (1, 2, 2), (1, 4, 4), (2, 8, 8), (4, 16, 16).

    Args:
        in_channels: image channels, >= 1.
        channels: channels of a token, a multiple of `num_heads` and of four. c1 has a quarter of them, c2 half.
        depth: blocks.
        num_heads: attention heads.
        patch_size: (z, y, x) voxels of a patch.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.

    Raises:
        ValueError: channels that the heads or four do not divide, no block, or a patch that is not three positive
            integers.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        channels: int,
        depth: int,
        num_heads: int,
        patch_size: Sequence[int] = (4, 8, 8),
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if channels % num_heads or channels % 4:
            raise ValueError(f"channels is {channels}; give a multiple of num_heads {num_heads} and of 4")
        if depth < 1:
            raise ValueError(f"depth is {depth}; give at least one block")
        self.activation_checkpointing = activation_checkpointing
        patch = check_axes("patch_size", patch_size)
        self.patches = PatchConv(in_channels, channels, patch)
        self.blocks = nn.ModuleList(ViTBlock(channels, num_heads) for _ in range(depth))
        self.norm = LayerNorm(channels, eps=1e-6)
        two = (gcd(patch[0], 2), gcd(patch[1], 2), gcd(patch[2], 2))
        four = (gcd(patch[0], 4), gcd(patch[1], 4), gcd(patch[2], 4))
        rest = (four[0] // two[0], four[1] // two[1], four[2] // two[2])
        half, quarter = channels // 2, channels // 4
        self.pyramid = nn.ModuleDict(
            {
                "c1": nn.Sequential(
                    nn.ConvTranspose3d(channels, half, two, two),
                    ChannelNorm(half, 1e-6),
                    nn.GELU(),
                    nn.ConvTranspose3d(half, quarter, rest, rest),
                ),
                "c2": nn.ConvTranspose3d(channels, half, two, two),
                "c3": nn.Identity(),
                "c4": nn.MaxPool3d(2, 2, ceil_mode=True),
            }
        )
        self.channels: dict[str, int] = {"c1": quarter, "c2": half, "c3": channels, "c4": channels}
        self.strides: dict[str, Axes] = {
            "c1": (patch[0] // four[0], patch[1] // four[1], patch[2] // four[2]),
            "c2": (patch[0] // two[0], patch[1] // two[1], patch[2] // two[2]),
            "c3": patch,
            "c4": (patch[0] * 2, patch[1] * 2, patch[2] * 2),
        }
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Conv3d):
                # A patch is one row of a matrix, not a filter: the fan that keeps its scale is that of the matrix.
                nn.init.xavier_uniform_(layer.weight.view(layer.weight.shape[0], -1))
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """[N, in_channels, D, H, W] -> {"c1": [N, channels / 4, ceil(D/s1z), ...], ..., "c4": ...}, finest first."""
        tokens, size = self.tokens(images)
        x = self.encode(tokens).transpose(1, 2).unflatten(2, size)
        features = {}
        for level, stride in self.strides.items():
            depth, height, width = (-(-n // s) for n, s in zip(images.shape[2:], stride, strict=True))
            # The last patch may reach beyond the image, and finer cells that lie wholly outside of it are no cells.
            features[level] = self.pyramid[level](x)[:, :, :depth, :height, :width]
        return features

    def tokens(self, images: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """[N, in_channels, D, H, W] -> tokens of all patches, places added, [N, L, channels]; (z, y, x) patches."""
        x = self.patches(images)
        size = tuple(x.shape[2:])
        return x.flatten(2).transpose(1, 2) + self.positions(size, x.shape[1], x.device).to(x.dtype), size

    def positions(self, size: Sequence[int], channels: int, device: torch.device) -> Tensor:
        """Codes of the places of (z, y, x) patches, [L, channels]."""
        # Waves shorter than two patches would only alias.
        patch = self.strides["c3"]
        centres = level_centres(size, patch, device)
        return sine_positions(centres, channels, min_wavelength=2.0 * max(patch), max_wavelength=1024.0)

    def encode(self, tokens: Tensor) -> Tensor:
        """Any of an image's tokens [N, l, channels] -> the same after all blocks."""
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        encoded: Tensor = self.norm(tokens)
        return encoded

    def layers_by_depth(self) -> list[list[nn.Module]]:
        """Modules from the image up: the patches, then each block; the pyramid and its norm lie beyond them."""
        return [[self.patches], *([block] for block in self.blocks)]


# Channels, blocks and heads (Dosovitskiy et al. 2021, table 1; Touvron et al. 2021, table 1).
SIZES: Mapping[str, tuple[int, int, int]] = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


def vit_backbone(
    *,
    size: str,
    in_channels: int = 1,
    patch_size: Sequence[int] = (4, 8, 8),
    activation_checkpointing: bool = False,
) -> ViT:
    """Vision Transformer of a named size.

    Args:
        size: "tiny", "small", "base" or "large".
        in_channels: image channels, >= 1.
        patch_size: (z, y, x) voxels of a patch, the stride of level c3.
        activation_checkpointing: see `ViT`.

    Returns:
        The backbone, with fresh weights.

    Raises:
        ValueError: another size, and as `ViT`.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; choose one of {', '.join(SIZES)}")
    channels, depth, num_heads = SIZES[size]
    return ViT(
        in_channels=in_channels,
        channels=channels,
        depth=depth,
        num_heads=num_heads,
        patch_size=patch_size,
        activation_checkpointing=activation_checkpointing,
    )
