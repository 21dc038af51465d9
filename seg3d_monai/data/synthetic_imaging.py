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

PATCH_UM, SHADOW_UM, HAZE_UM = 25.0, 4.0, 9.0
"""Lengths over which the specimen's own glow, the shadows and the haze change."""
TEXTURE_UM = (0.9, 2.2)
BLUR_REACH = 3.0  # standard deviations

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
    patches = smooth_noise(rng, shape, PATCH_UM / spacing)
    shadows = smooth_noise(rng, shape[:2], SHADOW_UM / spacing[:2])
    depth = (depth_um + (np.arange(shape[0]) + 0.5) * spacing[0]).astype(np.float32)
    light = illuminate(*blurred(stain, spacing, model), _haze(stain, spacing), patches, shadows, depth, model)
    return record(rng, light, model)


def blurred(stain: Array, spacing: Array, model: ImagingModel) -> tuple[Array, Array]:
    """The stain through the point spread at the surface, and through that of the depth; they reach `BLUR_REACH`."""
    sharp = ndimage.gaussian_filter(stain, np.array(model.psf_um) / spacing, truncate=BLUR_REACH)
    wide = ndimage.gaussian_filter(stain, np.array(model.scatter_um) / spacing, truncate=BLUR_REACH)
    return sharp, wide


def illuminate(
    sharp: Array, wide: Array, haze: Array, patches: Array, shadows: Array, depth: Array, model: ImagingModel
) -> Array:
    """Photons that a voxel would send on average, some planes at a time.

    Args:
        sharp: [d, h, w], the stain through the point spread at the surface.
        wide: [d, h, w], through that of the depth.
        haze: [d, h, w], scattered far.
        patches: [d, h, w], unit variance: where the specimen itself glows more or less.
        shadows: [d, h], unit variance: along the way of the sheet.
        depth: float32 [d], micrometres.
        model: the microscope.
    """
    scattered = (1 - np.exp(-depth / (2 * model.attenuation_um)))[:, None, None]
    light: Array = (1 - scattered) * sharp + scattered * wide
    light += model.haze * haze
    light *= model.photons
    light += model.autofluorescence * np.clip(1 + 0.3 * patches, 0.2, None)
    light *= np.exp(-depth / model.attenuation_um)[:, None, None]

    # The sheet travels along x: thinner light at both ends, and shadows that run along its way.
    across = np.linspace(-1, 1, sharp.shape[2], dtype=np.float32)
    light *= 1 - model.vignetting * across**2
    light *= np.clip(1 + model.stripes * shadows, 0.3, None)[:, :, None]
    return light


def record(rng: np.random.Generator, light: Array, model: ImagingModel) -> Array:
    """What the camera counts of so much light, uint16."""
    counts = rng.poisson(np.maximum(light, 0)).astype(np.float32) * model.gain + model.offset
    counts += model.read_noise * rng.standard_normal(light.shape, dtype=np.float32)
    return np.clip(np.rint(counts), 0, 65535).astype(np.uint16)


def _haze(stain: Array, spacing: Array) -> Array:
    """The stain blurred over many voxels, computed on a coarse grid."""
    step = coarse_step(HAZE_UM / 3, spacing)
    coarse = coarse_means(stain, step)
    coarse = ndimage.gaussian_filter(coarse, [HAZE_UM / s / k for s, k in zip(spacing, step, strict=True)])
    for axis, (size, k) in enumerate(zip(stain.shape, step, strict=True)):
        coarse = stretch(coarse, axis, k, size)
    return coarse


def coarse_step(length_um: float, spacing: Array) -> list[int]:
    """Voxels along (z, y, x) that a length holds, at least one."""
    return [max(1, int(length_um / s)) for s in spacing]


def coarse_means(stain: Array, step: Sequence[int]) -> Array:
    """The mean of every cell of `step` voxels; an odd end is continued by its last voxel."""
    padding = [(0, -size % k) for size, k in zip(stain.shape, step, strict=True)]
    padded = np.pad(stain, padding, mode="edge")
    coarse_shape = [part for size, k in zip(padded.shape, step, strict=True) for part in (size // k, k)]
    return padded.reshape(coarse_shape).mean(axis=(1, 3, 5))


def smooth_noise(rng: np.random.Generator, shape: Sequence[int], sigma: Sequence[float] | Array) -> Array:
    """Gaussian noise of unit variance and about the given correlation length (voxels)."""
    step = [max(1, int(s)) for s in sigma]
    coarse = [-(-size // k) + 1 for size, k in zip(shape, step, strict=True)]
    noise = rng.standard_normal(coarse, dtype=np.float32)
    noise = ndimage.gaussian_filter(noise, [s / k for s, k in zip(sigma, step, strict=True)], mode="wrap")
    for axis, (size, k) in enumerate(zip(shape, step, strict=True)):
        if k > 1:
            noise = stretch(noise, axis, k, size)
        else:
            noise = noise[(slice(None),) * axis + (slice(0, size),)]
    return (noise - noise.mean()) / (noise.std() + np.float32(1e-6))


def stretch(array: Array, axis: int, factor: int, size: int, first: int = 0) -> Array:
    """Linear interpolation along one axis by a whole factor.

    Args:
        array: at least one value along the axis, which lie `factor` apart.
        axis: the axis.
        factor: at least 1.
        size: how many values come out.
        first: place of the first of them, in their own distance, from the first value of the array.
    """
    position = np.arange(first, first + size) / factor
    low = np.minimum(position.astype(int), array.shape[axis] - 2) if array.shape[axis] > 1 else np.zeros(size, int)
    weight = (position - low).astype(np.float32)
    weight = weight.reshape([-1 if a == axis else 1 for a in range(array.ndim)])
    high = np.minimum(low + 1, array.shape[axis] - 1)
    return np.take(array, low, axis=axis) * (1 - weight) + np.take(array, high, axis=axis) * weight


def chromatin_texture(rng: np.random.Generator, shape: Sequence[int], spacing: Array, amplitude: float) -> Array:
    """What the brightness of nuclei is multiplied by; float32 [Z, Y, X]."""
    fine, coarse = (smooth_noise(rng, shape, length / spacing) for length in TEXTURE_UM)
    return mottle(fine, coarse, amplitude)


def mottle(fine: Array, coarse: Array, amplitude: float) -> Array:
    """The texture out of two noises of unit variance."""
    return np.clip(1 + amplitude * (0.7 * fine + 0.7 * coarse), 0.2, 2.0)
