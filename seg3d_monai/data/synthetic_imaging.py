"""The light-sheet microscope of the synthetic specimen: from fluorescence to camera counts.

A point spread that is wider along z and grows with depth, attenuation with depth, an uneven sheet with shadow stripes,
scattered haze, then photons (Poisson), gain, read noise and offset.

It must not know nuclei, labels or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class ImagingModel:
    """The microscope and its camera. Lengths in micrometres, light in photons.

    Args:
        photons: signal at the centre of an average nucleus at the surface of the specimen.
        psf_um: standard deviations (z, y, x) of the point spread at the surface.
        scatter_um: standard deviations (z, y, x) of the wider point spread that takes over with depth.
        attenuation_um: depth over which light falls to 1/e.
        haze: share of the signal that is scattered over about ten micrometres.
        autofluorescence: photons of the background at the surface.
        stripes: relative depth of the sheet's shadow stripes, in [0, 1).
        vignetting: relative loss of the sheet at its ends, in [0, 1).
        gain: camera counts a photon.
        read_noise: standard deviation of the camera noise, counts.
        offset: camera counts without light.
    """

    photons: float = 240.0
    psf_um: tuple[float, float, float] = (1.6, 0.55, 0.55)
    scatter_um: tuple[float, float, float] = (2.6, 0.9, 0.9)
    attenuation_um: float = 110.0
    haze: float = 0.25
    autofluorescence: float = 12.0
    stripes: float = 0.15
    vignetting: float = 0.3
    gain: float = 2.2
    read_noise: float = 4.0
    offset: float = 100.0


def expose(rng: np.random.Generator, stain: Array, spacing: Array, depth_um: float, model: ImagingModel) -> Array:
    """Turn fluorescence (1 is an average nucleus) into camera counts."""
    shape = stain.shape
    depth = (depth_um + (np.arange(shape[0]) + 0.5) * spacing[0]).astype(np.float32)
    sharp = ndimage.gaussian_filter(stain, np.array(model.psf_um) / spacing, truncate=3.0)
    wide = ndimage.gaussian_filter(stain, np.array(model.scatter_um) / spacing, truncate=3.0)
    scattered = (1 - np.exp(-depth / (2 * model.attenuation_um)))[:, None, None]
    light = (1 - scattered) * sharp + scattered * wide
    light += model.haze * _haze(stain, spacing)
    light *= model.photons
    patches = np.clip(1 + 0.3 * smooth_noise(rng, shape, 25.0 / spacing), 0.2, None)
    light += model.autofluorescence * patches
    light *= np.exp(-depth / model.attenuation_um)[:, None, None]

    # The sheet travels along x: thinner light at both ends, and shadows that run along its way.
    across = np.linspace(-1, 1, shape[2], dtype=np.float32)
    light *= 1 - model.vignetting * across**2
    shadows = smooth_noise(rng, shape[:2], 4.0 / spacing[:2])
    light *= np.clip(1 + model.stripes * shadows, 0.3, None)[:, :, None]

    counts = rng.poisson(np.maximum(light, 0)).astype(np.float32) * model.gain + model.offset
    counts += model.read_noise * rng.standard_normal(shape, dtype=np.float32)
    return np.clip(np.rint(counts), 0, 65535).astype(np.uint16)


def _haze(stain: Array, spacing: Array, sigma_um: float = 9.0) -> Array:
    """The stain blurred over many voxels, computed on a coarse grid."""
    step = [max(1, int(sigma_um / 3 / s)) for s in spacing]
    padding = [(0, -size % k) for size, k in zip(stain.shape, step, strict=True)]
    padded = np.pad(stain, padding, mode="edge")
    coarse_shape = [part for size, k in zip(padded.shape, step, strict=True) for part in (size // k, k)]
    coarse = padded.reshape(coarse_shape).mean(axis=(1, 3, 5))
    coarse = ndimage.gaussian_filter(coarse, [sigma_um / s / k for s, k in zip(spacing, step, strict=True)])
    for axis, (size, k) in enumerate(zip(stain.shape, step, strict=True)):
        coarse = _stretch(coarse, axis, k, size)
    return coarse


def smooth_noise(rng: np.random.Generator, shape: Sequence[int], sigma: Sequence[float] | Array) -> Array:
    """Gaussian noise of unit variance and about the given correlation length (voxels)."""
    step = [max(1, int(s)) for s in sigma]
    coarse = [-(-size // k) + 1 for size, k in zip(shape, step, strict=True)]
    noise = rng.standard_normal(coarse, dtype=np.float32)
    noise = ndimage.gaussian_filter(noise, [s / k for s, k in zip(sigma, step, strict=True)], mode="wrap")
    for axis, (size, k) in enumerate(zip(shape, step, strict=True)):
        if k > 1:
            noise = _stretch(noise, axis, k, size)
        else:
            noise = noise[(slice(None),) * axis + (slice(0, size),)]
    return (noise - noise.mean()) / (noise.std() + np.float32(1e-6))


def _stretch(array: Array, axis: int, factor: int, size: int) -> Array:
    """Linear interpolation along one axis by a whole factor."""
    position = np.arange(size) / factor
    low = np.minimum(position.astype(int), array.shape[axis] - 2) if array.shape[axis] > 1 else np.zeros(size, int)
    weight = (position - low).astype(np.float32)
    weight = weight.reshape([-1 if a == axis else 1 for a in range(array.ndim)])
    high = np.minimum(low + 1, array.shape[axis] - 1)
    return np.take(array, low, axis=axis) * (1 - weight) + np.take(array, high, axis=axis) * weight


def chromatin_texture(rng: np.random.Generator, shape: Sequence[int], spacing: Array, amplitude: float) -> Array:
    fine = smooth_noise(rng, shape, 0.9 / spacing)
    coarse = smooth_noise(rng, shape, 2.2 / spacing)
    return np.clip(1 + amplitude * (0.7 * fine + 0.7 * coarse), 0.2, 2.0)
