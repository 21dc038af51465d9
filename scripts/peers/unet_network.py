"""The U-Net of the race: MONAI's DynUNet with two outputs, its strides and kernels as the voxel size asks for."""

from collections.abc import Sequence

import torch
from monai.inferers import sliding_window_inference
from monai.networks.nets import DynUNet
from torch import Tensor, nn

FILTERS, QUICK_FILTERS = (16, 32, 64, 128), (4, 8, 8)
WINDOW = (64, 192, 192)
"""Most voxels (z, y, x) that are predicted at once; whole volumes where they are no larger."""


def levels_for(spacing_um: Sequence[float], num_levels: int) -> tuple[list[list[int]], list[list[int]]]:
    """Kernels and strides of each level.

    As nnU-Net (Isensee et al. 2021) plans: an axis whose voxels are twice as long as the shortest, or more, is neither
    convolved nor halved before the others have caught up.

    Args:
        spacing_um: micrometres per voxel (z, y, x).
        num_levels: levels, the first of stride 1.

    Returns:
        (kernels, strides), each [z, y, x] for every level.
    """
    spacing = [float(size) for size in spacing_um]
    kernels: list[list[int]] = []
    strides = [[1, 1, 1]]
    for _ in range(num_levels):
        is_fine = [size < 2 * min(spacing) for size in spacing]
        kernels.append([3 if fine else 1 for fine in is_fine])
        strides.append([2 if fine else 1 for fine in is_fine])
        spacing = [size * stride for size, stride in zip(spacing, strides[-1], strict=True)]
    return kernels, strides[:num_levels]


class DistanceUNet(nn.Module):
    """Logits of foreground and of the distance to the surface.

    Args:
        spacing_um: micrometres per voxel (z, y, x) of the training.
        filters: channels of each level.
    """

    def __init__(self, *, spacing_um: Sequence[float], filters: Sequence[int] = FILTERS) -> None:
        super().__init__()
        kernels, strides = levels_for(spacing_um, len(filters))
        self.total_stride = tuple(int(n) for n in torch.tensor(strides).prod(0))
        self.unet = DynUNet(
            spatial_dims=3,
            in_channels=1,
            out_channels=2,
            kernel_size=kernels,
            strides=strides,
            upsample_kernel_size=strides[1:],
            filters=list(filters),
            norm_name=("INSTANCE", {"affine": True}),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 1, D, H, W], extents multiples of `total_stride` -> logits [N, 2, D, H, W]."""
        return self.unet(images)

    @torch.no_grad()
    def maps(self, image: Tensor, autocast: torch.dtype | None) -> Tensor:
        """Foreground and distance in [0, 1], float32 [2, D, H, W], of a normalised image [D, H, W] of any extent."""
        window = [
            min(most, -(-extent // stride) * stride)
            for most, extent, stride in zip(WINDOW, image.shape, self.total_stride, strict=True)
        ]

        def logits(images: Tensor) -> Tensor:
            with torch.autocast(image.device.type, autocast, enabled=autocast is not None):
                return self(images).float()

        found = sliding_window_inference(
            image[None, None], window, 1, logits, overlap=0.25, mode="gaussian", padding_mode="replicate"
        )
        assert isinstance(found, Tensor)
        return found[0].sigmoid()
