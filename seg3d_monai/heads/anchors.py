"""Anchors of a feature pyramid, on MONAI's generator.

MONAI derives a level's stride as `image size // feature size`, which is wrong wherever a size is not a multiple of the
stride (51 // 26 = 1); the backbone's own strides are passed instead.
"""

from collections.abc import Mapping, Sequence

import torch
from monai.apps.detection.utils.anchor_utils import AnchorGeneratorWithAnchorShape
from torch import Tensor, nn


class AnchorGrid(nn.Module):
    """The same anchor shapes at every position of each level.

    Args:
        shapes: for each level, finest first, a list of (z, y, x) extents in input voxels; every level has as many.
        strides: (z, y, x) stride of each level by name, finest first.

    Raises:
        ValueError: unequal numbers of shapes, or another number of levels than strides.
    """

    def __init__(
        self, *, shapes: Sequence[Sequence[Sequence[float]]], strides: Mapping[str, tuple[int, int, int]]
    ) -> None:
        super().__init__()
        self.shapes: Tensor
        if len(shapes) != len(strides) or len({len(level) for level in shapes}) != 1:
            raise ValueError(
                f"anchor shapes {list(shapes)} do not fit the levels {list(strides)}; "
                "give one list a level, each with the same number of (z, y, x) extents"
            )
        self.num_anchors = len(shapes[0])
        self.strides = dict(strides)
        # A buffer: trained weights know what their deltas refer to, whatever the config says by then. Even extents,
        # since the generator rounds half extents.
        even = torch.tensor([[[2 * round(v / 2) for v in shape] for shape in level] for level in shapes])
        self.register_buffer("shapes", even.float())
        self._generator = AnchorGeneratorWithAnchorShape(feature_map_scales=(1,), base_anchor_shapes=shapes[0])

    def forward(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """{level: [N, C, D, H, W]} -> for each level, [D * H * W * num_anchors, 6] boxes in input voxels, float32."""
        sizes = [list(features[level].shape[2:]) for level in self.strides]
        device = next(iter(features.values())).device
        strides = [[torch.tensor(s, device=device) for s in stride] for stride in self.strides.values()]
        self._generator.cell_anchors = [self._generator.generate_anchors_using_shape(level) for level in self.shapes]
        return self._generator.grid_anchors(sizes, strides)
