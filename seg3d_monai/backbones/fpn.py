"""Feature pyramid network (Lin et al. 2017) over any backbone, with any stride per axis and level."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from seg3d_monai.layers import ConvNormAct, repeat_cells


class FeaturePyramid(nn.Module):
    """Top-down fusion of a backbone's levels into maps of equal channels.

    Args:
        backbone: module with `channels` and `strides` by level, finest first, and forward -> {level: features}.
        out_channels: channels of each output level.
        levels: backbone levels to fuse, finest first; default all. Output names are the input names with
            their first letter replaced by "p" ("c2" -> "p2").
        out_levels: pyramid levels to output, such as "p2"; default all. Others only pass their content down.
        norm: of `ConvNormAct`.

    Raises:
        ValueError: a level that the backbone or the pyramid does not have, or a level that does not tile the finer one.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        out_channels: int,
        levels: Sequence[str] | None = None,
        out_levels: Sequence[str] | None = None,
        norm: str = "group",
    ) -> None:
        super().__init__()
        channels: dict[str, int] = backbone.channels  # type: ignore[assignment]
        strides: dict[str, tuple[int, int, int]] = backbone.strides  # type: ignore[assignment]
        self.levels = list(levels or channels)
        unknown = [level for level in self.levels if level not in channels]
        if unknown:
            raise ValueError(f"levels {unknown} are not levels of the backbone; choose from {list(channels)}")
        names = {level: "p" + level[1:] for level in self.levels}
        unknown = sorted(set(out_levels or ()) - set(names.values()))
        if unknown:
            raise ValueError(f"out_levels {unknown} are not levels of the pyramid; choose from {list(names.values())}")
        read = [level for level, name in names.items() if out_levels is None or name in out_levels]
        self.ratios: dict[str, tuple[int, ...]] = {}
        for fine, coarse in pairwise(self.levels):
            if any(c % f for f, c in zip(strides[fine], strides[coarse], strict=True)):
                raise ValueError(f"strides of {fine} {strides[fine]} do not divide those of {coarse} {strides[coarse]}")
            self.ratios[fine] = tuple(c // f for f, c in zip(strides[fine], strides[coarse], strict=True))
        self.backbone = backbone
        self.lateral = nn.ModuleDict(
            {v: ConvNormAct(channels[v], out_channels, 1, act=False, norm=norm) for v in self.levels}
        )
        self.output = nn.ModuleDict({v: ConvNormAct(out_channels, out_channels, 3, norm=norm) for v in read})
        self.channels = {names[v]: out_channels for v in read}
        self.strides = {names[v]: strides[v] for v in read}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """[N, in_channels, D, H, W] -> {"p1": [N, out_channels, D1, H1, W1], ...}, finest first."""
        features = self.backbone(images)
        top: Tensor | None = None
        pyramid: dict[str, Tensor] = {}
        for level in reversed(self.levels):
            merged = self.lateral[level](features[level])
            if top is not None:
                # By the ratio of the strides, not of the sizes: cell i lies in coarse cell i // ratio at odd sizes too.
                grown = repeat_cells(top, self.ratios[level], 2)
                depth, height, width = merged.shape[2:]
                merged = merged + grown[:, :, :depth, :height, :width]
            top = merged
            if level in self.output:
                pyramid["p" + level[1:]] = self.output[level](merged)
        return {level: pyramid[level] for level in self.channels}
