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
        ValueError: unequal numbers of shapes, another number of levels than strides, or an extent that is not positive.
    """

    def __init__(
        self, *, shapes: Sequence[Sequence[Sequence[float]]], strides: Mapping[str, tuple[int, int, int]]
    ) -> None:
        super().__init__()
        self.cell_anchors: Tensor
        if len(shapes) != len(strides) or len({len(level) for level in shapes}) != 1:
            raise ValueError(
                f"anchor shapes {list(shapes)} do not fit the levels {list(strides)}; "
                "give one list a level, each with the same number of (z, y, x) extents"
            )
        if any(len(shape) != 3 or min(shape) <= 0 for level in shapes for shape in level):
            raise ValueError(f"anchor shapes are {list(shapes)}; give three positive extents (z, y, x) each")
        self.num_anchors = len(shapes[0])
        self.strides = dict(strides)
        half = torch.tensor(shapes, dtype=torch.float32) / 2
        # The generator centres cell i at i * stride + stride // 2; RoIAlign's cells are at (i + 0.5) * stride.
        shift = torch.tensor([[s / 2 - s // 2 for s in stride] for stride in strides.values()])[:, None]
        # A buffer: trained weights know what their deltas refer to, whatever the config says by then.
        self.register_buffer("cell_anchors", torch.cat([shift - half, shift + half], 2))
        self.steps: Tensor
        self.register_buffer("steps", torch.tensor(list(strides.values())), persistent=False)
        self._generator = AnchorGeneratorWithAnchorShape(feature_map_scales=(1,), base_anchor_shapes=shapes[0])

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return f"cell_anchors={self.cell_anchors.tolist()}, strides={self.strides}"

    def forward(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """{level: [N, C, D, H, W]} -> for each level, [D * H * W * num_anchors, 6] boxes in input voxels, float32."""
        sizes = [list(features[level].shape[2:]) for level in self.strides]
        self._generator.cell_anchors = list(self.cell_anchors.float())  # a network in half precision casts its buffers
        return self._generator.grid_anchors(sizes, [list(step) for step in self.steps])
