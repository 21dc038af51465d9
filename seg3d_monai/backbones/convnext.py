"""ConvNeXt (Liu et al. 2022) in 3D, with kernels and strides per axis: depthwise convolution, then an MLP on each cell.

MedNeXt (Roy et al. 2023) showed such blocks on small medical data sets. As there, kernels are smaller than the seven of
the paper, for a cube of seven has 343 taps. Stochastic depth is left out: it would draw from a worker's running state.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seg3d_monai.backbones.patches import PatchConv
from seg3d_monai.backbones.resnet import DEFAULT_STRIDES, Axes
from seg3d_monai.layers import ChannelNorm, Conv3d, LayerNorm
from seg3d_monai.layers.conv import check_axes


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, LayerNorm, expansion by four, GELU, projection; scaled and added to the input.

    Args:
        channels: channels of input and output.
        kernel_size: (z, y, x) odd kernel of the depthwise convolution.
        layer_scale: first value of the learned scale of what is added.
    """

    def __init__(self, channels: int, kernel_size: Axes, layer_scale: float) -> None:
        super().__init__()
        padding = (kernel_size[0] // 2, kernel_size[1] // 2, kernel_size[2] // 2)
        self.depthwise = Conv3d(channels, channels, kernel_size, padding=padding, groups=channels)
        self.norm = LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, 4 * channels)
        self.project = nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, D, H, W] -> the same."""
        y = self.norm(self.depthwise(x).movedim(1, -1))
        y = self.project(F.gelu(self.expand(y))) * self.scale
        return x + y.movedim(-1, 1)


class ConvNeXt(nn.Module):
    """ConvNeXt for volumes.

    The levels are normalised over their channels without a learned scale, so that a level that nobody reads leaves no
    parameter without a gradient.

    Args:
        in_channels: image channels, >= 1.
        depths: blocks of each stage.
        widths: channels of each stage.
        kernel_size: (z, y, x) odd kernel of the depthwise convolutions.
        stem_stride: (z, y, x) stride of the stem, whose kernel is one voxel wider on each side.
        stage_strides: (z, y, x) stride before each stage.
        layer_scale: first value of the scale of each block's contribution. The paper's 1e-6 suits 300 epochs of
            ImageNet; crops of microscopy are trained for hundreds of steps.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.

    Raises:
        ValueError: the stage lists differ in length, a stage has no block, the kernel is even, or a kernel or stride
            is not three positive integers.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        depths: Sequence[int],
        widths: Sequence[int],
        kernel_size: Sequence[int] = (5, 5, 5),
        stem_stride: Sequence[int] = (1, 2, 2),
        stage_strides: Sequence[Sequence[int]] = DEFAULT_STRIDES,
        layer_scale: float = 0.01,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not len(depths) == len(widths) == len(stage_strides):
            raise ValueError(
                f"depths {list(depths)}, widths {list(widths)} and stage_strides {list(stage_strides)} "
                "differ in length; give one entry a stage in each"
            )
        if any(depth < 1 for depth in depths):
            raise ValueError(f"depths is {list(depths)}; give each stage at least one block")
        kernel = check_axes("kernel_size", kernel_size)
        if any(k % 2 == 0 for k in kernel):
            raise ValueError(f"kernel_size is {kernel_size!r}; give odd extents, which keep the size at stride 1")
        self.activation_checkpointing = activation_checkpointing
        stride = check_axes("stem_stride", stem_stride)
        self.stem = nn.Sequential(PatchConv(in_channels, widths[0], stride, overlap=1), ChannelNorm(widths[0], 1e-6))
        self.shrink = nn.ModuleDict()
        self.stages = nn.ModuleDict()
        self.channels: dict[str, int] = {}
        self.strides: dict[str, Axes] = {}
        channels = widths[0]
        for i, (depth, width, step) in enumerate(zip(depths, widths, stage_strides, strict=True), start=1):
            step = check_axes("stage_strides", step)
            same = width == channels and step == (1, 1, 1)
            self.shrink[f"c{i}"] = (
                nn.Identity() if same else nn.Sequential(ChannelNorm(channels, 1e-6), PatchConv(channels, width, step))
            )
            self.stages[f"c{i}"] = nn.Sequential(*(ConvNeXtBlock(width, kernel, layer_scale) for _ in range(depth)))
            channels = width
            stride = (stride[0] * step[0], stride[1] * step[1], stride[2] * step[2])
            self.channels[f"c{i}"] = channels
            self.strides[f"c{i}"] = stride
        for layer in self.modules():
            if isinstance(layer, nn.Conv3d | nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """[N, in_channels, D, H, W] -> {"c1": [N, C1, ceil(D/s1z), ...], "c2": ...}, finest first."""
        x = self.stem(images)
        features = {}
        for level, stage in self.stages.items():
            x = self.shrink[level](x)
            for block in stage:  # type: ignore[attr-defined]
                if self.activation_checkpointing and self.training:
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            features[level] = F.layer_norm(x.movedim(1, -1), x.shape[1:2], eps=1e-6).movedim(-1, 1)
        return features

    def layers_by_depth(self) -> list[list[nn.Module]]:
        """Modules from the image up: the stem, then each block, a stage's first with what shrinks its input."""
        layers: list[list[nn.Module]] = [[self.stem]]
        for level, stage in self.stages.items():
            first, *others = stage.children()
            layers += [[self.shrink[level], first], *([block] for block in others)]
        return layers


# Blocks of each stage and channels of the first, doubled at each following one (Liu et al. 2022, section 3).
SIZES: Mapping[str, tuple[tuple[int, ...], int]] = {
    "tiny": ((3, 3, 9, 3), 96),
    "small": ((3, 3, 27, 3), 96),
    "base": ((3, 3, 27, 3), 128),
}


def convnext_backbone(
    *,
    size: str,
    in_channels: int = 1,
    kernel_size: Sequence[int] = (5, 5, 5),
    stem_stride: Sequence[int] = (1, 2, 2),
    stage_strides: Sequence[Sequence[int]] = DEFAULT_STRIDES,
    layer_scale: float = 0.01,
    activation_checkpointing: bool = False,
) -> ConvNeXt:
    """ConvNeXt of a named size.

    Args:
        size: "tiny", "small" or "base".
        in_channels: image channels, >= 1.
        kernel_size: (z, y, x) odd kernel of the depthwise convolutions.
        stem_stride: (z, y, x) stride of the stem.
        stage_strides: (z, y, x) stride before each of the four stages.
        layer_scale, activation_checkpointing: see `ConvNeXt`.

    Returns:
        The backbone, with fresh weights.

    Raises:
        ValueError: another size, and as `ConvNeXt`.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; choose one of {', '.join(SIZES)}")
    depths, width = SIZES[size]
    return ConvNeXt(
        in_channels=in_channels,
        depths=depths,
        widths=[width * 2**i for i in range(len(depths))],
        kernel_size=kernel_size,
        stem_stride=stem_stride,
        stage_strides=stage_strides,
        layer_scale=layer_scale,
        activation_checkpointing=activation_checkpointing,
    )
