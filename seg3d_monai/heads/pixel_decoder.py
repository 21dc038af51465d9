"""Pixel decoder of Mask2Former (Cheng et al. 2022) and Mask DINO (Li et al. 2023) in 3D.

An encoder of multi-scale deformable attention (Zhu et al. 2021) turns the coarse levels of a backbone into a memory;
the fine levels are fused with its finest level into mask features.

Two things differ from the papers. Places are voxels, never shares of the image, and norms go over the channels of one
cell, never over the image: what a cell becomes then depends neither on the size of the block nor on its padding.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seg3d_monai.layers import (
    CellLinear,
    CellNorm,
    ChannelNorm,
    Conv3d,
    DeformableAttention3d,
    FeedForward,
    LayerNorm,
    PixelDecoderOutput,
    level_centres,
    level_positions,
    place_features,
    repeat_cells,
)

Axes = tuple[int, int, int]


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention over all levels, then a feed-forward block, each followed by sum and norm.

    Args:
        channels: channels of the memory.
        num_levels: levels of the memory.
        num_heads: heads of the attention.
        num_points: places that a head reads in a level.
        feedforward: channels inside the feed-forward block.
    """

    def __init__(self, *, channels: int, num_levels: int, num_heads: int, num_points: int, feedforward: int) -> None:
        super().__init__()
        self.attention = DeformableAttention3d(
            channels=channels, num_levels=num_levels, num_heads=num_heads, num_points=num_points
        )
        self.norm = LayerNorm(channels)
        self.feedforward = FeedForward(channels=channels, hidden=feedforward)

    def forward(
        self,
        memory: Tensor,
        positions: Tensor,
        references: Tensor,
        sizes: Sequence[Axes],
        strides: Sequence[Axes],
        padding: Tensor | None,
    ) -> Tensor:
        """Memory [N, S, C], positions [S, C], references [1, S, 3], padding bool [N, S] -> [N, S, C]."""
        read = self.attention(memory + positions, references, memory, sizes, strides, padding)
        out: Tensor = self.feedforward(self.norm(memory + read))
        return out


class Fusion(nn.Module):
    """One step from coarse to fine: a lateral projection, plus the coarse map, then a 3³ convolution.

    Args:
        in_channels: channels of the backbone's level.
        channels: channels of the coarse map and of the result.
        ratio: (z, y, x) fine cells of a coarse one.
    """

    def __init__(self, *, in_channels: int, channels: int, ratio: Axes) -> None:
        super().__init__()
        self.ratio = ratio
        self.lateral = CellLinear(in_channels, channels, bias=False)  # as published: a norm follows
        self.lateral_norm = CellNorm(channels)
        self.conv = Conv3d(channels, channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.norm = ChannelNorm(channels, relu=True)

    def forward(self, fine: Tensor, coarse: Tensor, padding: Tensor | None) -> Tensor:
        """Fuse two levels.

        Args:
            fine: [N, in_channels, D, H, W], a level of the backbone.
            coarse: [N, C, d, h, w].
            padding: bool [N, D, H, W], cells of the fine level that count as zero.

        Returns:
            [N, C, D, H, W] with the channels last in memory, as all maps here.
        """
        depth, height, width = fine.shape[2:]
        merged = self.lateral_norm(self.lateral(fine)).unflatten(1, (depth, height, width))
        # The nearest cell is enough: the convolution can make linear interpolation of it. By the ratio of the strides,
        # not of the sizes: cell i lies in coarse cell i // ratio at odd sizes too.
        grown = repeat_cells(coarse.to(merged.dtype).movedim(1, -1), self.ratio, 1)
        merged = _without((merged + grown[:, :depth, :height, :width]).movedim(-1, 1), padding)
        fused: Tensor = self.norm(self.conv(merged))
        return fused


class DeformablePixelDecoder(nn.Module):
    """Features of a backbone -> memory of several levels, and mask features.

    Args:
        channels: channels of the backbone's levels, finest first.
        strides: (z, y, x) stride of each.
        memory_levels: levels of the memory, finest first.
        mask_levels: levels that are fused into the mask features, finest first; the first gives their resolution.
        hidden: channels of the memory.
        mask_channels: channels of the mask features that come from the image; PLACE_CHANNELS more tell the place.
        num_layers: encoder layers, >= 1.
        num_heads: heads of the attention.
        num_points: places that a head reads in a level.
        feedforward: channels inside the feed-forward blocks.
        activation_checkpointing: recompute each layer in the backward pass instead of keeping its activations.

    Raises:
        ValueError: no level or layer, a level that the backbone does not have, or a stride that does not divide the
            next coarser one of the levels used.
    """

    def __init__(
        self,
        *,
        channels: Mapping[str, int],
        strides: Mapping[str, Axes],
        memory_levels: Sequence[str],
        mask_levels: Sequence[str],
        hidden: int = 256,
        mask_channels: int = 256,
        num_layers: int = 6,
        num_heads: int = 8,
        num_points: int = 4,
        feedforward: int = 1024,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        for argument, levels in (("memory_levels", memory_levels), ("mask_levels", mask_levels)):
            if not levels:
                raise ValueError(f"{argument} is empty; choose from {list(channels)}")
            if unknown := [level for level in levels if level not in channels]:
                raise ValueError(f"{argument} {unknown} are not levels of the backbone; choose from {list(channels)}")
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}; give at least 1")
        chain = [*mask_levels, *memory_levels]
        for fine, coarse in pairwise(chain):
            if any(c % f for f, c in zip(strides[fine], strides[coarse], strict=True)):
                raise ValueError(
                    f"strides of {fine} {strides[fine]} do not divide those of {coarse} {strides[coarse]}; "
                    "give mask_levels and memory_levels finest first, mask_levels no coarser than memory_levels"
                )
        self.memory_levels = list(memory_levels)
        self.mask_levels = list(mask_levels)
        self.strides = {level: _axes(strides[level]) for level in chain}
        self.hidden = hidden
        self.activation_checkpointing = activation_checkpointing
        self.projections = nn.ModuleDict(
            {v: nn.Sequential(CellLinear(channels[v], hidden), LayerNorm(hidden)) for v in memory_levels}
        )
        self.level_embeddings = nn.Parameter(torch.randn(len(memory_levels), hidden))
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(
                channels=hidden,
                num_levels=len(memory_levels),
                num_heads=num_heads,
                num_points=num_points,
                feedforward=feedforward,
            )
            for _ in range(num_layers)
        )
        self.fusions = nn.ModuleDict()
        for fine, coarse in reversed(list(pairwise([*mask_levels, memory_levels[0]]))):
            ratio = _axes([c // f for f, c in zip(strides[fine], strides[coarse], strict=True)])
            self.fusions[fine] = Fusion(in_channels=channels[fine], channels=hidden, ratio=ratio)
        self.mask_projection = nn.Linear(hidden, mask_channels)

    def forward(self, features: Mapping[str, Tensor], valid_sizes: Tensor | None = None) -> PixelDecoderOutput:
        """Decode.

        Args:
            features: {level: [N, C_level, D, H, W]}.
            valid_sizes: int64 [N, 3], voxels (z, y, x) of each image that are no padding, which lies at the upper ends;
                None where nothing is padded. The valid cells of the result do not depend on what lies beyond.

        Returns:
            Memory and mask features.
        """
        sizes = [_axes(features[level].shape[2:]) for level in self.memory_levels]
        strides = [self.strides[level] for level in self.memory_levels]
        padding = self._padding(features, valid_sizes)
        is_padded = [padding[level] for level in self.memory_levels] if padding else None
        memory = self._encode(features, sizes, strides, is_padded)
        levels = [
            cells.unflatten(1, size).movedim(-1, 1)
            for cells, size in zip(memory.split([d * h * w for d, h, w in sizes], 1), sizes, strict=True)
        ]
        fused = levels[0]
        for level, fusion in self.fusions.items():
            fused = self._run(fusion, features[level], fused, padding.get(level))
        finest = self.mask_levels[0]
        content = self.mask_projection(fused.movedim(1, -1))
        places = place_features(content.shape[1:4], self.strides[finest], content.device).to(content.dtype)
        mask_features = torch.cat([content, places.expand(*content.shape[:4], -1)], -1).movedim(-1, 1)
        mask_features = _without(mask_features, padding.get(finest))
        return PixelDecoderOutput(levels, sizes, strides, is_padded, mask_features, self.strides[finest])

    def _encode(
        self, features: Mapping[str, Tensor], sizes: list[Axes], strides: list[Axes], padding: list[Tensor] | None
    ) -> Tensor:
        memory = torch.cat([self.projections[level](features[level]) for level in self.memory_levels], 1)
        flat_padding = None if padding is None else torch.cat([level.flatten(1) for level in padding], 1)
        places, positions = [], []
        for size, stride, embedding in zip(sizes, strides, self.level_embeddings, strict=True):
            places.append(level_centres(size, stride, memory.device))
            positions.append(level_positions(size, stride, self.hidden, memory.device).to(embedding.dtype) + embedding)
        references = torch.cat(places)[None]  # the same for all images
        position = torch.cat(positions)
        for layer in self.layers:
            memory = self._run(layer, memory, position, references, sizes, strides, flat_padding)
        return memory

    def _padding(self, features: Mapping[str, Tensor], valid_sizes: Tensor | None) -> dict[str, Tensor]:
        """For each level bool [N, d, h, w], True for cells that begin beyond the valid part; empty without sizes.

        A cell that the border cuts is valid, as it is the last one of an image of that size without padding.
        """
        if valid_sizes is None:
            return {}
        padding = {}
        for level, stride in self.strides.items():
            size = features[level].shape[2:]
            z, y, x = (
                torch.arange(n, device=valid_sizes.device) * s >= valid_sizes[:, axis, None]
                for axis, (n, s) in enumerate(zip(size, stride, strict=True))
            )
            padding[level] = z[:, :, None, None] | y[:, None, :, None] | x[:, None, None, :]
        return padding

    def _run(self, module: nn.Module, *inputs: object) -> Tensor:
        if self.activation_checkpointing and self.training:
            return checkpoint(module, *inputs, use_reentrant=False)
        out: Tensor = module(*inputs)
        return out


def _without(features: Tensor, padding: Tensor | None) -> Tensor:
    """Features [N, C, D, H, W], channels last in memory, with zeros where padding [N, D, H, W] is True."""
    if padding is None:
        return features
    # On the view with the channels last: masked_fill returns the order of the axes, not that of the memory.
    return features.movedim(1, -1).masked_fill(padding[..., None], 0).movedim(-1, 1)


def _axes(values: Sequence[int]) -> Axes:
    return int(values[0]), int(values[1]), int(values[2])
