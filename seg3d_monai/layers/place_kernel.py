"""The part of a mask logit that tells where its query is.

Features of convolutions and attention look alike at two cells that look alike, so their product with one embedding
lights up both: in a volume of hundreds of nuclei a mask would take long to learn which of them is meant. Dynamic masks
of scenes know coordinates for that reason (CoordConv in SOLOv2, Wang et al. 2020; relative coordinates in CondInst,
Tian et al. 2020). Here the mask features end with sines and cosines of their places, and the embeddings with those of
their queries' centres, times gains g that the query chooses: the product is a sum over axes and wavelengths of
g cos(2 pi (place - centre) / wavelength), a kernel around the query that depends on the distance alone, wherever the
block lies and however large it is.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from seg3d_monai.layers.position import level_positions, sine_positions

PAIRS = 6
PLACE_CHANNELS = 3 * 2 * PAIRS
MIN_WAVELENGTH, MAX_WAVELENGTH = 12.0, 384.0
"""Voxels: from the size of a small cell to more than a block."""
FIRST_GAIN = 0.3


def encode_places(places: Tensor) -> Tensor:
    """Sines and cosines [..., PLACE_CHANNELS] of places [..., 3], voxels; axis by axis, sines before cosines."""
    return sine_positions(places, PLACE_CHANNELS, min_wavelength=MIN_WAVELENGTH, max_wavelength=MAX_WAVELENGTH)


def place_features(size: Sequence[int], stride: Sequence[int], device: torch.device | str) -> Tensor:
    """`encode_places` of the centres of all cells of a level.

    Args:
        size: (d, h, w) cells.
        stride: (z, y, x) voxels of a cell.
        device: where the result is.

    Returns:
        float32 [d, h, w, PLACE_CHANNELS].
    """
    wavelengths = {"min_wavelength": MIN_WAVELENGTH, "max_wavelength": MAX_WAVELENGTH}
    return level_positions(size, stride, PLACE_CHANNELS, device, **wavelengths).unflatten(0, tuple(size))


class PlaceEmbedding(nn.Module):
    """The end of a mask embedding: the query's place, with a gain for each axis and wavelength.

    Args:
        channels: channels of the queries, which choose the gains.
    """

    def __init__(self, *, channels: int) -> None:
        super().__init__()
        self.gains = nn.Linear(channels, 3 * PAIRS)
        nn.init.zeros_(self.gains.weight)
        nn.init.constant_(self.gains.bias, math.log(math.expm1(FIRST_GAIN)))

    def forward(self, queries: Tensor, centres: Tensor) -> Tensor:
        """Queries [N, Q, C], centres [N, Q, 3] in voxels -> [N, Q, PLACE_CHANNELS], float32 or better."""
        dtype = torch.promote_types(queries.dtype, torch.float32)
        gains = nn.functional.softplus(self.gains(queries).to(dtype)).unflatten(-1, (3, 1, PAIRS))
        return (gains * encode_places(centres).unflatten(-1, (3, 2, PAIRS))).flatten(-3)
