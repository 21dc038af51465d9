"""Semantic head: which cells of the finest level hold instances and which their borders, as an aid of training.

A detector's own losses look at some anchors and boxes of a crop. A map that is supervised everywhere teaches the same
features more from each crop, as in Retina U-Net (Jaeger et al. 2020) and the semantic branch of Hybrid Task Cascade
(Chen et al. 2019). A detection does not need it.
"""

from torch import Tensor, nn

SEMANTIC_MAPS = ("foreground", "border")


class SemanticHead(nn.Module):
    """A 1³ convolution to one logit for each of `SEMANTIC_MAPS`.

    Args:
        in_channels: channels of the features.
        level: name of the level that it reads.
    """

    def __init__(self, *, in_channels: int, level: str) -> None:
        super().__init__()
        self.level = level
        self.logits = nn.Conv3d(in_channels, len(SEMANTIC_MAPS), 1)
        nn.init.normal_(self.logits.weight, std=0.01)
        nn.init.constant_(self.logits.bias, -2.0)  # type: ignore[arg-type]  # most cells are background

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """{level: [N, C, D, H, W]} -> logits [N, 2, D, H, W] of its level, float32."""
        logits: Tensor = self.logits(features[self.level])
        return logits.float()
