"""What a pixel decoder hands to a transformer decoder. Here, since decoders must not know heads, nor heads decoders."""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from seg3d_monai.layers.position import level_centres

Axes = tuple[int, int, int]


class _Fields(NamedTuple):
    memory: list[Tensor]
    sizes: list[Axes]
    strides: list[Axes]
    padding: list[Tensor] | None
    mask_features: Tensor
    mask_stride: Axes


class PixelDecoderOutput(_Fields):
    """Memory of several levels, and mask features.

    A tuple, in which DeepSpeed finds the tensors: under ZeRO 3 it fetches a module's weights again when gradients of
    the module's outputs come.

    Args:
        memory: [N, C, d, h, w] of each level, finest first.
        sizes: (d, h, w) of each level.
        strides: (z, y, x) voxels of a cell of each level.
        padding: bool [N, d, h, w] of each level, True for cells that hold no valid voxel of their image; None where
            all voxels of all images are valid.
        mask_features: [N, Cm, D1, H1, W1]; a mask logit is their product with a query's mask embedding. The last
            PLACE_CHANNELS of the Cm channels tell the place of the cell (place_kernel.py). Zero in the padding, where
            every logit is then 0 and turns no neighbour's sign when interpolated.
        mask_stride: (z, y, x) voxels of a cell of the mask features.
    """

    @cached_property
    def flat_memory(self) -> Tensor:
        """[N, S, C], the cells of all levels, level after level, each in the order z, y, x."""
        return torch.cat([level.flatten(2).transpose(1, 2) for level in self.memory], 1)

    @cached_property
    def flat_padding(self) -> Tensor | None:
        """Bool [N, S] for the cells of `flat_memory`, or None."""
        return None if self.padding is None else torch.cat([level.flatten(1) for level in self.padding], 1)

    @cached_property
    def centres(self) -> Tensor:
        """[S, 3] float32, centres of the cells of `flat_memory` in voxels."""
        device = self.mask_features.device
        return torch.cat([level_centres(n, s, device) for n, s in zip(self.sizes, self.strides, strict=True)])

    @cached_property
    def cell_sizes(self) -> Tensor:
        """[S, 3] float32, extents of the cells of `flat_memory` in voxels."""
        device, levels = self.mask_features.device, zip(self.sizes, self.strides, strict=True)
        # Filled, not copied: a copy from the host would wait for all the work that the device still has to do.
        columns = [[torch.full((d * h * w,), float(s), device=device) for s in stride] for (d, h, w), stride in levels]
        return torch.cat([torch.stack(level, 1) for level in columns])
