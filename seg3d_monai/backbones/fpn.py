"""Feature pyramid network (Lin et al. 2017) over any backbone, with any stride per axis and level."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from seg3d_monai.layers import ConvNormAct


class FeaturePyramid(nn.Module):
    """Top-down fusion of a backbone's levels into maps of equal channels.

    Args:
        backbone: module with `channels` and `strides` by level, finest first, and forward -> {level: features}.
        out_channels: channels of each output level.
        levels: backbone levels to fuse, finest first; default all. Output names are the input names with
            their first letter replaced by "p" ("c2" -> "p2").

    Raises:
        ValueError: a level that the backbone does not have.
    """

    def __init__(self, *, backbone: nn.Module, out_channels: int, levels: Sequence[str] | None = None) -> None:
        super().__init__()
        channels: dict[str, int] = backbone.channels  # type: ignore[assignment]
        strides: dict[str, tuple[int, int, int]] = backbone.strides  # type: ignore[assignment]
        self.levels = list(levels or channels)
        unknown = [level for level in self.levels if level not in channels]
        if unknown:
            raise ValueError(f"levels {unknown} are not levels of the backbone; choose from {list(channels)}")
        self.backbone = backbone
        self.lateral = nn.ModuleDict({v: ConvNormAct(channels[v], out_channels, 1, act=False) for v in self.levels})
        self.output = nn.ModuleDict({v: ConvNormAct(out_channels, out_channels, 3) for v in self.levels})
        self.channels = {"p" + v[1:]: out_channels for v in self.levels}
        self.strides = {"p" + v[1:]: strides[v] for v in self.levels}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """[N, in_channels, D, H, W] -> {"p1": [N, out_channels, D1, H1, W1], ...}, finest first."""
        features = self.backbone(images)
        top: Tensor | None = None
        pyramid: dict[str, Tensor] = {}
        for level in reversed(self.levels):
            merged = self.lateral[level](features[level])
            if top is not None:
                merged = merged + F.interpolate(top, size=merged.shape[2:], mode="nearest")
            top = merged
            pyramid["p" + level[1:]] = self.output[level](merged)
        return {level: pyramid[level] for level in self.channels}
