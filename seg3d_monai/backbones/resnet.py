"""3D residual networks (He et al. 2016) with a stride per axis for anisotropic voxels.

Level `c1` is the first stage; a level's stride is the product of the stem's and of all stages' up to it.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seg3d_monai.layers import ConvNormAct
from seg3d_monai.layers.conv import check_axes

Axes = tuple[int, int, int]
DEFAULT_STRIDES: tuple[Axes, ...] = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))


class Residual(nn.Module):
    """A residual block, basic (two 3³ convolutions) or bottleneck (1, 3³, 1; `expansion` 4).

    Args:
        in_channels: input channels.
        width: channels of the inner convolutions; the output has `width * expansion`.
        stride: (z, y, x) stride of the block.
        bottleneck: whether the block is a bottleneck.
        norm: of `ConvNormAct`.
    """

    def __init__(self, in_channels: int, width: int, stride: Axes, bottleneck: bool, norm: str = "group") -> None:
        super().__init__()
        out_channels = width * (4 if bottleneck else 1)
        if bottleneck:
            self.body = nn.Sequential(
                ConvNormAct(in_channels, width, 1, norm=norm),
                ConvNormAct(width, width, 3, stride, norm=norm),
                ConvNormAct(width, out_channels, 1, act=False, norm=norm),
            )
        else:
            self.body = nn.Sequential(
                ConvNormAct(in_channels, width, 3, stride, norm=norm),
                ConvNormAct(width, out_channels, 3, act=False, norm=norm),
            )
        # A block starts as the identity: deep stacks then train without warm-up of the signal's scale.
        nn.init.zeros_(self.body[-1][1].weight)  # type: ignore[index]
        same = in_channels == out_channels and stride == (1, 1, 1)
        self.shortcut = nn.Identity() if same else ConvNormAct(in_channels, out_channels, 1, stride, False, norm)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, D, H, W] -> [N, width * expansion, D', H', W']."""
        out: Tensor = self.body(x).add_(self.shortcut(x)).relu_()  # in place: no norm needs its result again
        return out


class ResNet(nn.Module):
    """ResNet for volumes.

    Args:
        in_channels: image channels, >= 1.
        depths: blocks of each stage.
        widths: width of each stage's blocks; a bottleneck stage outputs four times as many channels.
        stem_channels: channels of the stem.
        stem_kernel: (z, y, x) odd kernel of the stem.
        stem_stride: (z, y, x) stride of the stem.
        stage_strides: (z, y, x) stride of each stage.
        bottleneck: bottleneck blocks instead of basic ones.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        norm: of `ConvNormAct`.

    Raises:
        ValueError: the stage lists differ in length, a stage has no block, or a stride is not three positive integers.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        depths: Sequence[int],
        widths: Sequence[int],
        stem_channels: int,
        stem_kernel: Sequence[int] = (3, 5, 5),
        stem_stride: Sequence[int] = (1, 2, 2),
        stage_strides: Sequence[Sequence[int]] = DEFAULT_STRIDES,
        bottleneck: bool = False,
        activation_checkpointing: bool = False,
        norm: str = "group",
    ) -> None:
        super().__init__()
        if not len(depths) == len(widths) == len(stage_strides):
            raise ValueError(
                f"depths {list(depths)}, widths {list(widths)} and stage_strides {list(stage_strides)} "
                "differ in length; give one entry a stage in each"
            )
        if any(depth < 1 for depth in depths):
            raise ValueError(f"depths is {list(depths)}; give each stage at least one block")
        self.activation_checkpointing = activation_checkpointing
        stride = check_axes("stem_stride", stem_stride)
        self.stem = ConvNormAct(in_channels, stem_channels, check_axes("stem_kernel", stem_kernel), stride, norm=norm)
        self.stages = nn.ModuleDict()
        self.channels: dict[str, int] = {}
        self.strides: dict[str, Axes] = {}
        channels = stem_channels
        for i, (depth, width, step) in enumerate(zip(depths, widths, stage_strides, strict=True), start=1):
            step = check_axes("stage_strides", step)
            blocks = []
            for j in range(depth):
                blocks.append(Residual(channels, width, step if j == 0 else (1, 1, 1), bottleneck, norm))
                channels = width * (4 if bottleneck else 1)
            self.stages[f"c{i}"] = nn.Sequential(*blocks)
            stride = (stride[0] * step[0], stride[1] * step[1], stride[2] * step[2])
            self.channels[f"c{i}"] = channels
            self.strides[f"c{i}"] = stride

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """[N, in_channels, D, H, W] -> {"c1": [N, C1, ceil(D/s1z), ...], "c2": ...}, finest first."""
        x = self.stem(images)
        features = {}
        for level, stage in self.stages.items():
            for block in stage:  # type: ignore[attr-defined]
                if self.activation_checkpointing and self.training:
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            features[level] = x
        return features

    def layers_by_depth(self) -> list[list[nn.Module]]:
        """Modules from the image up: the stem, then each block."""
        return [[self.stem], *([block] for stage in self.stages.values() for block in stage)]  # type: ignore[attr-defined]


# Blocks of each stage, and whether they are bottlenecks, by depth (He et al. 2016, table 1; 10 is half of 18).
DEPTHS: dict[int, tuple[tuple[int, ...], bool]] = {
    10: ((1, 1, 1, 1), False),
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
}


def resnet_backbone(
    *,
    depth: int,
    in_channels: int = 1,
    width: int = 64,
    stem_stride: Sequence[int] = (1, 2, 2),
    stage_strides: Sequence[Sequence[int]] = DEFAULT_STRIDES,
    activation_checkpointing: bool = False,
    norm: str = "group",
) -> ResNet:
    """ResNet of a named depth.

    Args:
        depth: 10, 18, 34, 50 or 101.
        in_channels: image channels, >= 1.
        width: width of the first stage, doubled at each following one.
        stem_stride: (z, y, x) stride of the stem.
        stage_strides: (z, y, x) stride of each of the four stages.
        activation_checkpointing, norm: see `ResNet`.

    Returns:
        The backbone, with fresh weights.

    Raises:
        ValueError: another depth.
    """
    if depth not in DEPTHS:
        raise ValueError(f"depth is {depth!r}; choose one of {', '.join(map(str, DEPTHS))}")
    blocks, bottleneck = DEPTHS[depth]
    return ResNet(
        in_channels=in_channels,
        depths=blocks,
        widths=[width * 2**i for i in range(len(blocks))],
        stem_channels=width,
        stem_stride=stem_stride,
        stage_strides=stage_strides,
        bottleneck=bottleneck,
        activation_checkpointing=activation_checkpointing,
        norm=norm,
    )
