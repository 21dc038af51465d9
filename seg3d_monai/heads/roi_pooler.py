"""RoI features from a pyramid: each box is pooled from the level that fits its size (Lin et al. 2017, eq. 1)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from seg3d_monai.layers.conv import check_axes
from seg3d_monai.ops import roi_align3d


class RoIPooler(nn.Module):
    """RoIAlign over one or several levels.

    A box goes to the coarsest level on which it still spans `min_cells` feature cells (geometric mean over the axes),
    or to the finest one.

    Args:
        output_size: (z, y, x) bins.
        strides: (z, y, x) stride of each level to pool from, finest first.
        sampling_ratio: samples a bin and axis; 0 takes as many as the bin spans cells.
        min_cells: feature cells that a box should span.
    """

    def __init__(
        self,
        *,
        output_size: Sequence[int],
        strides: Mapping[str, tuple[int, int, int]],
        sampling_ratio: int = 2,
        min_cells: float = 5.0,
    ) -> None:
        super().__init__()
        self.output_size = check_axes("output_size", output_size)
        self.strides = dict(strides)
        self.sampling_ratio = sampling_ratio
        self.min_cells = min_cells

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return f"{self.output_size}, strides={self.strides}, {self.sampling_ratio}, min_cells={self.min_cells}"

    def assign_levels(self, boxes: Tensor) -> Tensor:
        """Boxes [K, 6] -> index [K] of the level that each is pooled from."""
        extent = (boxes[:, 3:] - boxes[:, :3]).clamp(min=1e-3).log().mean(1)
        strides = torch.tensor(list(self.strides.values()), dtype=torch.float32, device=boxes.device)
        cells = extent[:, None] - strides.log().mean(1)
        fits: Tensor = cells >= torch.tensor(self.min_cells, device=boxes.device).log()
        return (fits.sum(1) - 1).clamp(min=0)

    def forward(self, features: Mapping[str, Tensor], boxes: Tensor, batch_index: Tensor) -> Tensor:
        """Features of boxes.

        Args:
            features: {level: [N, C, D, H, W]}.
            boxes: [K, 6] in input voxels.
            batch_index: [K] int64, the image of each.

        Returns:
            [K, C, d, h, w]; zero rows go through every level's operator, so all ranks call the same modules.
        """
        maps = [features[level] for level in self.strides]
        scales = [tuple(1.0 / s for s in stride) for stride in self.strides.values()]
        if len(maps) == 1:
            return roi_align3d(maps[0], boxes, batch_index, self.output_size, scales[0], self.sampling_ratio)
        level_of = self.assign_levels(boxes)
        chosen = [(level_of == i).nonzero().squeeze(1) for i in range(len(maps))]
        pooled = [
            roi_align3d(feature, boxes[rows], batch_index[rows], self.output_size, scale, self.sampling_ratio)
            for feature, rows, scale in zip(maps, chosen, scales, strict=True)
        ]
        # A copy to the wanted rows, because its gradient is a plain gather, that of `pooled[order]` a slow sum of rows.
        found = torch.cat(pooled)
        return torch.empty_like(found).index_copy_(0, torch.cat(chosen), found)
