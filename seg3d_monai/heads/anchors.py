"""Anchors of a feature pyramid (Ren et al. 2015; Lin et al. 2017), any shapes and any stride per axis and level.

MONAI's generator is not used: it derives a level's stride as `image size // feature size`, which is wrong wherever a
size is not a multiple of the stride (51 // 26 = 1), and to import it costs every process that predicts two seconds.
"""

from collections.abc import Mapping, Sequence

import torch
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
        # A buffer: trained weights know what their deltas refer to, whatever the config says by then.
        self.register_buffer("cell_anchors", torch.cat([-half, half], 2))
        self.steps: Tensor
        self.register_buffer("steps", torch.tensor(list(strides.values())), persistent=False)

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return f"cell_anchors={self.cell_anchors.tolist()}, strides={self.strides}"

    def forward(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """{level: [N, C, D, H, W]} -> for each level, [D * H * W * num_anchors, 6] boxes in input voxels, float32."""
        return [
            self._grid(features[level].shape[2:], step, shapes.float())  # a network in half precision casts its buffers
            for level, step, shapes in zip(self.strides, self.steps, self.cell_anchors, strict=True)
        ]

    @staticmethod
    def _grid(size: Sequence[int], step: Tensor, shapes: Tensor) -> Tensor:
        """`shapes` [A, 6] at every cell of a level of `size` (D, H, W), z slowest and the shapes fastest."""
        cells = torch.cartesian_prod(*(torch.arange(n, device=shapes.device) for n in size))
        middle = (cells + 0.5) * step  # as RoIAlign places cells
        return (middle.repeat(1, 2)[:, None] + shapes).flatten(0, 1)
