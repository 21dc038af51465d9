"""Sine encodings of places and extents (Vaswani et al. 2017), in voxels.

Published detectors divide places by the size of the image. Here a wavelength is a length in voxels, so that a cell
looks the same to the network in a training crop and in a larger block.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MIN_WAVELENGTH = 4.0
MAX_WAVELENGTH = 1024.0


def sine_positions(
    coordinates: Tensor,
    channels: int,
    *,
    min_wavelength: float = MIN_WAVELENGTH,
    max_wavelength: float = MAX_WAVELENGTH,
) -> Tensor:
    """Sines and cosines of coordinates at wavelengths that are spaced geometrically.

    Args:
        coordinates: [..., A], voxels: A = 3 for centres, 6 for centres and extents.
        channels: channels of the encoding, >= 2 A. Each coordinate gets the same even number of them, first all sines,
            then all cosines, from the shortest wavelength to the longest; what is left at the end is zero.
        min_wavelength: shortest wavelength, voxels.
        max_wavelength: longest wavelength, voxels.

    Returns:
        [..., channels], float32, or float64 for float64 coordinates.

    Raises:
        ValueError: too few channels.
    """
    axes = coordinates.shape[-1]
    pairs = channels // (2 * axes)
    if pairs < 1:
        raise ValueError(f"channels is {channels}; give at least {2 * axes}, a sine and a cosine for each coordinate")
    coordinates = coordinates.to(torch.promote_types(coordinates.dtype, torch.float32))
    step = torch.arange(pairs, dtype=coordinates.dtype, device=coordinates.device) / max(pairs - 1, 1)
    angle = coordinates[..., None] * (2 * math.pi / min_wavelength * (min_wavelength / max_wavelength) ** step)
    encoding = torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)
    return torch.nn.functional.pad(encoding, (0, channels - 2 * axes * pairs))


def level_centres(size: Sequence[int], stride: Sequence[int], device: torch.device | str) -> Tensor:
    """Centres of all cells of a level.

    Args:
        size: (d, h, w) cells.
        stride: (z, y, x) voxels of a cell; cell j covers the voxels from j * stride to (j + 1) * stride.
        device: where the result lies.

    Returns:
        [d * h * w, 3] float32, voxels, in the order z, y, x.
    """
    axes = [_axis_centres(n, s, device) for n, s in zip(size, stride, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)


def level_positions(
    size: Sequence[int],
    stride: Sequence[int],
    channels: int,
    device: torch.device | str,
    *,
    min_wavelength: float = MIN_WAVELENGTH,
    max_wavelength: float = MAX_WAVELENGTH,
) -> Tensor:
    """`sine_positions` of `level_centres`, with sines of one row an axis only.

    Args:
        size: (d, h, w) cells.
        stride: (z, y, x) voxels of a cell.
        channels, min_wavelength, max_wavelength: as of `sine_positions`.
        device: where the result is.

    Returns:
        float32 [d * h * w, channels].

    Raises:
        ValueError: fewer than six channels, or as `sine_positions`.
    """
    if channels < 6:
        raise ValueError(f"channels is {channels}; give at least 6, a sine and a cosine for each axis")
    parts = []
    for axis, (n, s) in enumerate(zip(size, stride, strict=True)):
        row = sine_positions(
            _axis_centres(n, s, device)[:, None],
            channels // 6 * 2,
            min_wavelength=min_wavelength,
            max_wavelength=max_wavelength,
        )
        shape = [1, 1, 1, row.shape[1]]
        shape[axis] = n
        parts.append(row.view(shape).expand(*size, -1))
    parts.append(parts[0].new_zeros(()).expand(*size, channels - channels // 6 * 6))
    return torch.cat(parts, -1).flatten(0, 2)


def _axis_centres(cells: int, stride: int, device: torch.device | str) -> Tensor:
    return (torch.arange(cells, dtype=torch.float32, device=device) + 0.5) * stride
