"""Mask head of Mask R-CNN (He et al. 2017) in 3D: RoI features -> mask logits at twice the RoI resolution."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from seg3d_monai.layers import ConvNormAct


class MaskHead(nn.Module):
    """3³ convolutions, a transposed convolution that doubles the resolution, and one logit a class.

    With `image_channels` another 3³ convolution follows the transposed one, and reads the image beside the features:
    these are of a level that is coarser than masks of small objects. The image takes the place of as many of the
    features' channels.

    Args:
        in_channels: channels of the RoI features.
        channels: channels of the convolutions.
        num_convs: how many convolutions.
        num_classes: foreground classes.
        upsample: (z, y, x) factor of the transposed convolution.
        image_channels: channels of the image that it reads; 0 reads none.
        norm: of `ConvNormAct`.

    Raises:
        ValueError: as many channels of the image as there are of features.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        channels: int,
        num_convs: int,
        num_classes: int,
        upsample: tuple[int, int, int] = (2, 2, 2),
        image_channels: int = 0,
        norm: str = "group",
    ) -> None:
        super().__init__()
        fine = channels // 2
        if image_channels >= fine:
            raise ValueError(f"image_channels is {image_channels}; it must be less than half of channels {channels}")
        widths = [in_channels] + [channels] * num_convs
        self.body = nn.Sequential(*(ConvNormAct(a, b, norm=norm) for a, b in pairwise(widths)))
        self.upsample = (upsample[0], upsample[1], upsample[2])
        self.up = nn.Sequential(
            nn.ConvTranspose3d(widths[-1], fine - image_channels, self.upsample, self.upsample), nn.ReLU(inplace=True)
        )
        self.image_channels = image_channels
        self.detail = ConvNormAct(fine, fine, norm=norm) if image_channels else None
        self.logits = nn.Conv3d(fine, num_classes, 1)

    def forward(self, roi_features: Tensor, roi_images: Tensor | None = None) -> Tensor:
        """[K, C, d, h, w] -> [K, num_classes, 2d, 2h, 2w] float32 (at the default `upsample`).

        Args:
            roi_features: features of each box.
            roi_images: the image in each box, [K, image_channels, 2d, 2h, 2w], where the head reads it.
        """
        x = self.up(self.body(roi_features))
        if self.detail is not None:
            assert roi_images is not None
            x = self.detail(torch.cat([x, roi_images.to(x.dtype)], 1))
        logits: Tensor = self.logits(x)
        return logits.float()
