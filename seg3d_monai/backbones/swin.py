"""Swin Transformer (Liu et al. 2021) in 3D: MONAI's blocks, with a stride per axis and the levels of a detector.

MONAI's `SwinTransformer` is built and its blocks are run in their order here, for three reasons. Its own forward
returns what comes after a stage's patch merging, so that the finest level would be bare patches that no block has seen;
its merging halves all axes, which anisotropic voxels do not want; and where a level is smaller than the window it clips
the window and then reads wrong rows of the table of relative positions, so such a level is padded to the window.

MONAI is imported where a Swin is made: it takes two seconds, which processes with other networks need not pay.
"""

from collections.abc import Mapping, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seg3d_monai.backbones.patches import pad_to_multiple
from seg3d_monai.backbones.resnet import Axes
from seg3d_monai.layers import LayerNorm
from seg3d_monai.layers.conv import check_axes

DEFAULT_MERGE_STRIDES: tuple[Axes, ...] = ((2, 2, 2), (2, 2, 2), (2, 2, 2))


class PatchMerging(nn.Module):
    """Joins the cells of a patch into one of twice their channels: MONAI's layer, with an extent per axis.

    Args:
        channels: input channels; the output has twice as many.
        stride: (z, y, x) cells that become one.
    """

    def __init__(self, channels: int, stride: Axes) -> None:
        super().__init__()
        self.stride = stride
        joined = channels * stride[0] * stride[1] * stride[2]
        self.norm = LayerNorm(joined)
        self.reduction = nn.Linear(joined, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, D, H, W, C] -> [N, ceil(D/sz), ceil(H/sy), ceil(W/sx), 2 * C]."""
        x = pad_to_multiple(x.movedim(-1, 1), self.stride).movedim(1, -1)
        sz, sy, sx = self.stride
        parts = [x[:, i::sz, j::sy, k::sx] for i, j, k in product(range(sz), range(sy), range(sx))]
        merged: Tensor = self.reduction(self.norm(torch.cat(parts, -1)))
        return merged


class Swin(nn.Module):
    """Swin Transformer for volumes, around MONAI's.

    The levels are normalised over their channels without a learned scale, as MONAI does.

    Args:
        in_channels: image channels, >= 1.
        embed_channels: channels of the first stage, doubled at each following one.
        depths: blocks of each stage, one to four stages; every second block shifts its windows.
        num_heads: attention heads of each stage, a divisor of its channels.
        patch_size: (z, y, x) voxels of a patch, the stride of the first level.
        merge_strides: (z, y, x) cells joined between each two stages.
        window_size: (z, y, x) cells of a window, the same at all stages. A level smaller than it is padded to it.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.

    Raises:
        ValueError: lists that do not fit each other, a stage without a block, heads that do not divide the channels,
            or a patch, stride or window that is not three positive integers.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        embed_channels: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        patch_size: Sequence[int] = (1, 2, 2),
        merge_strides: Sequence[Sequence[int]] = DEFAULT_MERGE_STRIDES,
        window_size: Sequence[int] = (4, 6, 6),
        activation_checkpointing: bool = False,
    ) -> None:
        from monai.networks.nets.swin_unetr import SwinTransformer

        super().__init__()
        if not len(depths) == len(num_heads) == len(merge_strides) + 1 or not 1 <= len(depths) <= 4:
            raise ValueError(
                f"depths {list(depths)}, num_heads {list(num_heads)} and merge_strides {list(merge_strides)} do not "
                "fit each other; give one to four stages, one entry for each, and one stride between each two"
            )
        if any(depth < 1 for depth in depths):
            raise ValueError(f"depths is {list(depths)}; give each stage at least one block")
        widths = [embed_channels * 2**i for i in range(len(depths))]
        if any(width % heads for width, heads in zip(widths, num_heads, strict=True)):
            raise ValueError(f"num_heads {list(num_heads)} do not divide the channels of the stages, {widths}")
        stride = check_axes("patch_size", patch_size)
        self.window_size = check_axes("window_size", window_size)
        self.transformer = SwinTransformer(
            in_chans=in_channels,
            embed_dim=embed_channels,
            window_size=self.window_size,
            patch_size=stride,
            depths=depths,
            num_heads=num_heads,
            patch_norm=True,
            use_checkpoint=activation_checkpointing,
            downsample=None,
        )
        self.channels: dict[str, int] = {}
        self.strides: dict[str, Axes] = {}
        self.merging = nn.ModuleDict()
        for i, width in enumerate(widths, start=1):
            if i > 1:
                step = check_axes("merge_strides", merge_strides[i - 2])
                self.merging[f"c{i}"] = PatchMerging(width // 2, step)
                stride = (stride[0] * step[0], stride[1] * step[1], stride[2] * step[2])
            self.channels[f"c{i}"] = width
            self.strides[f"c{i}"] = stride
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """[N, in_channels, D, H, W] -> {"c1": [N, C1, ceil(D/s1z), ...], "c2": ...}, finest first."""
        x = self.transformer.patch_embed(images).movedim(1, -1)
        features = {}
        for i, level in enumerate(self.channels, start=1):
            if level in self.merging:
                x = self.merging[level](x)
            x = self._run_blocks(getattr(self.transformer, f"layers{i}")[0], x)
            features[level] = F.layer_norm(x, x.shape[-1:]).movedim(-1, 1)
        return features

    def _run_blocks(self, stage: nn.Module, x: Tensor) -> Tensor:
        """The blocks of a stage on [N, D, H, W, C]."""
        from monai.networks.nets.swin_unetr import compute_mask, get_window_size

        depth, height, width = x.shape[1:4]
        missing = [max(w - n, 0) for w, n in zip(self.window_size, x.shape[1:4], strict=True)]
        x = F.pad(x, (0, 0, 0, missing[2], 0, missing[1], 0, missing[0]))
        window, shift = get_window_size(x.shape[1:4], stage.window_size, stage.shift_size)
        grid = [-(-n // w) * w for n, w in zip(x.shape[1:4], window, strict=True)]
        mask = compute_mask(grid, window, shift, x.device) if any(shift) else None
        for block in stage.blocks:  # type: ignore[union-attr]
            x = block(x, mask)
        return x[:, :depth, :height, :width]

    def layers_by_depth(self) -> list[list[nn.Module]]:
        """Modules from the image up: the patches, then each block, a stage's first with the merging before it."""
        layers: list[list[nn.Module]] = [[self.transformer.patch_embed]]
        for i, level in enumerate(self.channels, start=1):
            first, *others = getattr(self.transformer, f"layers{i}")[0].blocks
            merging = [self.merging[level]] if level in self.merging else []
            layers += [[*merging, first], *([block] for block in others)]
        return layers


# Channels of the first stage, blocks and heads of each (Liu et al. 2021, section 3.3).
SIZES: Mapping[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
}


def swin_backbone(
    *,
    size: str,
    in_channels: int = 1,
    patch_size: Sequence[int] = (1, 2, 2),
    merge_strides: Sequence[Sequence[int]] = DEFAULT_MERGE_STRIDES,
    window_size: Sequence[int] = (4, 6, 6),
    activation_checkpointing: bool = False,
) -> Swin:
    """Swin Transformer of a named size.

    Args:
        size: "tiny", "small" or "base".
        in_channels: image channels, >= 1.
        patch_size: (z, y, x) voxels of a patch, the stride of the first level.
        merge_strides: (z, y, x) cells joined before each of the last three stages.
        window_size: (z, y, x) cells of a window.
        activation_checkpointing: see `Swin`.

    Returns:
        The backbone, with fresh weights.

    Raises:
        ValueError: another size, and as `Swin`.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; choose one of {', '.join(SIZES)}")
    embed_channels, depths, num_heads = SIZES[size]
    return Swin(
        in_channels=in_channels,
        embed_channels=embed_channels,
        depths=depths,
        num_heads=num_heads,
        patch_size=patch_size,
        merge_strides=merge_strides,
        window_size=window_size,
        activation_checkpointing=activation_checkpointing,
    )
