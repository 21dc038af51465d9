"""The classical baseline: Gaussian, Otsu's threshold, distance transform, watershed, all by scikit-image.

Settings are those of scikit-image's own segmentation example, carried to physical units, and tuned to nothing. It
serves comparison only: nothing in the prediction path may import it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.filters import gaussian, threshold_otsu
from skimage.segmentation import watershed


def otsu_watershed(
    image: np.ndarray,
    spacing_um: Sequence[float] = (1.0, 1.0, 1.0),
    *,
    sigma_um: float = 1.0,
    seed_radius_um: float = 4.0,
) -> np.ndarray:
    """Segment bright blobs without learning.

    Args:
        image: [Z, Y, X], any real dtype.
        spacing_um: voxel size (z, y, x).
        sigma_um: standard deviation of the Gaussian before the threshold, >= 0.
        seed_radius_um: a seed is the greatest distance within this reach of it, > 0.

    Returns:
        labels uint32 [Z, Y, X], 0 background, ids compact from 1.

    Raises:
        ValueError: the image is not 3-D, or a setting is out of its range.
    """
    if image.ndim != 3:
        raise ValueError(f"image must be [Z, Y, X], got shape {image.shape}; choose one channel")
    spacing = np.asarray(spacing_um, dtype=np.float64)
    if spacing.shape != (3,) or not np.all(spacing > 0):
        raise ValueError(f"spacing_um must be three positive numbers (z, y, x), got {tuple(spacing_um)}")
    if sigma_um < 0 or seed_radius_um <= 0:
        raise ValueError(f"sigma_um must be >= 0 and seed_radius_um > 0, got {sigma_um} and {seed_radius_um}")
    smooth = gaussian(image.astype(np.float32), sigma=sigma_um / spacing, preserve_range=True)
    if smooth.size == 0 or smooth.min() == smooth.max():
        return np.zeros(image.shape, dtype=np.uint32)
    foreground = smooth > threshold_otsu(smooth)
    distance = ndimage.distance_transform_edt(foreground, sampling=spacing)
    footprint = np.ones([2 * max(1, round(seed_radius_um / s)) + 1 for s in spacing], dtype=bool)
    components, _ = ndimage.label(foreground)
    peaks = peak_local_max(distance, footprint=footprint, labels=components, exclude_border=False)
    is_peak = np.zeros(image.shape, dtype=bool)
    is_peak[tuple(peaks.T)] = True
    # Neighbouring voxels of equal distance are one seed.
    seeds, _ = ndimage.label(is_peak, structure=np.ones((3, 3, 3)))
    return watershed(-distance, seeds, mask=foreground).astype(np.uint32)
