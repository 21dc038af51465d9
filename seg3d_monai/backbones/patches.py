"""Convolutions whose patches are centred on the cells of their output."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from seg3d_monai.layers.conv import check_axes


class PatchConv(nn.Conv3d):
    """Convolution of stride s whose cell j sees the voxels [j * s - overlap, (j + 1) * s + overlap).

    The kernel is stride + 2 * overlap. Zeros are added at the upper end where the size is no multiple of the stride.

    Args:
        in_channels: input channels.
        out_channels: output channels.
        stride: (z, y, x) stride, which is the extent of a cell.
        overlap: input cells beyond the cell at each side.

    Raises:
        ValueError: the stride is not three positive integers.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: Sequence[int], overlap: int = 0) -> None:
        step = check_axes("stride", stride)
        kernel = (step[0] + 2 * overlap, step[1] + 2 * overlap, step[2] + 2 * overlap)
        super().__init__(in_channels, out_channels, kernel, step, padding=overlap)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, D, H, W] -> [N, out_channels, ceil(D/sz), ceil(H/sy), ceil(W/sx)]."""
        return super().forward(pad_to_multiple(x, self.stride))


def pad_to_multiple(x: Tensor, multiple: Sequence[int]) -> Tensor:
    """Zeros at the upper ends of the last three axes, up to a multiple of `multiple` (z, y, x)."""
    missing = [-n % m for n, m in zip(x.shape[2:], multiple, strict=True)]
    return F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0])) if any(missing) else x
