"""A synthetic stack of any depth, some planes at a time: memory grows with a plane, not with the stack.

The same nuclei and the same microscope as in memory: nuclei are placed for the whole stack and painted where they are
asked for, and every draw of noise is a function of the seed and the plane. So a voxel depends neither on how many
planes are made together nor on their order. It is not that of `make_volume`, which draws noise for a whole volume.

It must not know files, training or metrics.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from math import ceil, prod
from typing import Any

import numpy as np
from scipy import ndimage

from seg3d_monai.data.synthetic_imaging import (
    BLUR_REACH,
    HAZE_UM,
    PATCH_UM,
    SHADOW_UM,
    TEXTURE_UM,
    ImagingModel,
    blurred,
    coarse_means,
    coarse_step,
    illuminate,
    mottle,
    record,
    stretch,
)
from seg3d_monai.data.synthetic_nuclei import NucleiModel, paint_planes, place_nuclei, planes_of, visible_ids
from seg3d_monai.data.synthetic_volume import brightness_of, check_kinds, checked_shape, checked_spacing, stain
from seg3d_monai.data.volume import Volume, check_roi

_SLAB_VOXELS = 2**24
_REACH = 4.0  # standard deviations of the filters for haze and noise
_FINE, _COARSE, _PATCHES, _SHADOWS, _CAMERA = range(1, 6)  # streams of draws, after the seed

Array = np.ndarray


class SlabStack:
    """Image and labels of a synthetic stack, made by the slab.

    Args:
        shape: voxels (z, y, x).
        seed: integers >= 0 from which every draw follows.
        spacing_um, depth_um, channels, num_classes, nuclei, imaging: as for `make_volume`.
        planes: of a slab, at least; None for as many as 2**24 voxels are.

    Attributes:
        image: uint16 volume of (channels, Z, Y, X).
        labels: uint32 volume of (1, Z, Y, X), 0 background, ids compact from 1.
        classes: int64 [G], by id from 1.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        seed: Sequence[int],
        spacing_um: Sequence[float] = (2.0, 0.8, 0.8),
        depth_um: float = 0.0,
        channels: int = 1,
        num_classes: int = 1,
        nuclei: NucleiModel | None = None,
        imaging: ImagingModel | None = None,
        planes: int | None = None,
    ) -> None:
        self.shape = checked_shape("shape", shape)
        self.spacing = checked_spacing(spacing_um)
        check_kinds(channels, num_classes, depth_um)
        self.channels, self._depth_um = channels, float(depth_um)
        self._seed = tuple(int(number) for number in seed)
        self._nuclei, self._imaging = nuclei or NucleiModel(), imaging or ImagingModel()
        facts = [self.shape, self._seed, self.spacing.tolist(), depth_um, channels, num_classes]
        models = [asdict(self._nuclei), asdict(self._imaging)]
        self.digest = hashlib.blake2b(json.dumps([facts, models]).encode(), digest_size=16).hexdigest()

        rng = np.random.default_rng(self._seed)
        self._placed = place_nuclei(rng, np.array(self.shape) * self.spacing, self._nuclei, num_classes)
        self._spans = np.array([planes_of(nucleus, self.spacing) for nucleus in self._placed]).reshape(-1, 2)
        self._step = coarse_step(HAZE_UM / 3, self.spacing)
        wanted = max(1, _SLAB_VOXELS // prod(self.shape[1:])) if planes is None else planes
        self.planes = self._step[0] * ceil(wanted / self._step[0])  # no coarse plane lies in two slabs
        self._blur_planes = int(
            BLUR_REACH * max(self._imaging.psf_um[0], self._imaging.scatter_um[0]) / self.spacing[0] + 0.5
        )
        self._haze_planes = int(_REACH * HAZE_UM / self.spacing[0] / self._step[0] + 0.5)  # coarse ones
        ahead = ceil((self._haze_planes + 2) * self._step[0] / self.planes)
        behind = ceil(self._blur_planes / self.planes)
        self._stain = lru_cache(ahead + behind + 2)(self._make_stain)
        self._coarse_stain = lru_cache(2 * ahead + 2)(self._make_coarse_stain)
        y, x = self.shape[1:]
        self._texture = [
            PlaneNoise((*self._seed, stream), (y, x), length / self.spacing)
            for stream, length in zip((_FINE, _COARSE), TEXTURE_UM, strict=True)
        ]
        self._patches, self._shadows = (
            [PlaneNoise((*self._seed, stream, channel), size, sigma) for channel in range(channels)]
            for stream, size, sigma in (
                (_PATCHES, (y, x), PATCH_UM / self.spacing),
                (_SHADOWS, (y,), SHADOW_UM / self.spacing[:2]),
            )
        )

        voxels = np.zeros(len(self._placed) + 1, np.int64)
        for slab in range(self.num_slabs):
            voxels += np.bincount(self._paint(slab)[0].ravel(), minlength=len(voxels))
        self._new_id = visible_ids(voxels)
        kept = [nucleus for nucleus, number in zip(self._placed, self._new_id[1:], strict=True) if number]
        self._brightness = brightness_of(kept)
        self.classes = np.array([nucleus.kind for nucleus in kept], dtype=np.int64)
        self.image: Volume = _SlabVolume(self, is_label=False)
        self.labels: Volume = _SlabVolume(self, is_label=True)

    @property
    def num_slabs(self) -> int:
        """Slabs of the stack; the last one may have fewer planes."""
        return -(-self.shape[0] // self.planes)

    def span(self, slab: int) -> tuple[int, int]:
        """First and one past the last plane of a slab."""
        return slab * self.planes, min((slab + 1) * self.planes, self.shape[0])

    def make_labels(self, slab: int) -> Array:
        """Labels of a slab, uint32 [1, planes, Y, X]."""
        return self._new_id[self._paint(slab)[0]][None]

    def make_image(self, slab: int) -> Array:
        """Camera counts of a slab, uint16 [C, planes, Y, X]."""
        first, stop = self.span(slab)
        low, high = max(0, first - self._blur_planes), min(self.shape[0], stop + self._blur_planes)
        stains = np.concatenate(
            [self._stain(s) for s in range(low // self.planes, (high - 1) // self.planes + 1)], axis=1
        )
        start = low // self.planes * self.planes
        depth = (self._depth_um + (np.arange(first, stop) + 0.5) * self.spacing[0]).astype(np.float32)
        image = np.empty((self.channels, stop - first, *self.shape[1:]), np.uint16)
        for channel in range(self.channels):
            window = slice(first - low, stop - low)
            sharp, wide = blurred(stains[channel, low - start : high - start], self.spacing, self._imaging)
            patches = self._patches[channel].planes(first, stop)
            shadows = self._shadows[channel].planes(first, stop)
            haze = self._haze(channel, first, stop)
            light = illuminate(sharp[window], wide[window], haze, patches, shadows, depth, self._imaging)
            for place in range(stop - first):
                rng = np.random.default_rng((*self._seed, _CAMERA, channel, first + place))
                image[channel, place] = record(rng, light[place], self._imaging)
        return image

    def _paint(self, slab: int) -> tuple[Array, Array, Array]:
        first, stop = self.span(slab)
        touching = np.flatnonzero((self._spans[:, 0] < stop) & (self._spans[:, 1] > first)).tolist()
        return paint_planes([(i + 1, self._placed[i]) for i in touching], self.shape, self.spacing, (first, stop))

    def _make_stain(self, slab: int) -> Array:
        """Fluorescence of a slab, float32 [C, planes, Y, X]."""
        owner, nearest, runner_up = self._paint(slab)
        fine, coarse = (noise.planes(*self.span(slab)) for noise in self._texture)
        texture = mottle(fine, coarse, self._nuclei.texture)
        return np.stack(stain(self._new_id[owner], nearest, runner_up, self._brightness, texture, self.channels))

    def _make_coarse_stain(self, slab: int) -> Array:
        return np.stack([coarse_means(channel, self._step) for channel in self._stain(slab)])

    def _haze(self, channel: int, first: int, stop: int) -> Array:
        step = self._step[0]
        count = -(-self.shape[0] // step)
        # Between its neighbours a plane is interpolated, past the last but one it is extrapolated.
        begin, end = max(0, min(first // step, count - 2)), min((stop - 1) // step + 2, count)
        low, high = max(0, begin - self._haze_planes), min(count, end + self._haze_planes)
        depth = self.planes // step
        slabs = range(low // depth, (high - 1) // depth + 1)
        coarse = np.concatenate([self._coarse_stain(slab)[channel] for slab in slabs])
        start = slabs[0] * depth
        sigma = [HAZE_UM / s / k for s, k in zip(self.spacing, self._step, strict=True)]
        smooth = ndimage.gaussian_filter(coarse[low - start : high - start], sigma, truncate=_REACH)
        haze = stretch(smooth[begin - low : end - low], 0, step, stop - first, first - begin * step)
        for axis in (1, 2):
            haze = stretch(haze, axis, self._step[axis], self.shape[axis])
        return haze


class PlaneNoise:
    """Gaussian noise of unit variance and about the given correlation length, without an end along z.

    Args:
        seed: integers >= 0.
        size: extent of a plane, voxels.
        sigma: correlation length along z and along the plane's axes, voxels.
    """

    def __init__(self, seed: Sequence[int], size: Sequence[int], sigma: Sequence[float] | Array) -> None:
        self._seed, self._size = tuple(seed), tuple(size)
        self._step = [max(1, int(s)) for s in sigma]
        self._sigma = [float(s) / k for s, k in zip(sigma, self._step, strict=True)]
        self._coarse = [-(-n // k) + 1 for n, k in zip(self._size, self._step[1:], strict=True)]
        self._weights = _gaussian(self._sigma[0])
        self._radius = len(self._weights) // 2
        variance = float((self._weights**2).sum())
        for s, n in zip(self._sigma[1:], self._coarse, strict=True):
            weights = _gaussian(s)
            variance *= float((np.bincount(np.arange(len(weights)) % n, weights) ** 2).sum())  # it wraps around
        self._scale = np.float32(variance**-0.5)
        self._plane = lru_cache(len(self._weights) + 1)(self._make_plane)

    def planes(self, first: int, stop: int) -> Array:
        """Some planes, float32 [stop - first, *size]."""
        step = self._step[0]
        low, high = first // step, (stop - 1) // step + 2
        noise = np.empty((high - low, *self._coarse), np.float32)
        for place in range(high - low):
            near = [self._plane(low + place + shift) for shift in range(len(self._weights))]
            noise[place] = sum(np.float32(w) * plane for w, plane in zip(self._weights, near, strict=True))
        noise *= self._scale
        noise = stretch(noise, 0, step, stop - first, first - low * step) if step > 1 else noise[: stop - first]
        for axis, (size, k) in enumerate(zip(self._size, self._step[1:], strict=True), start=1):
            if k > 1:
                noise = stretch(noise, axis, k, size)
            else:
                noise = noise[(slice(None),) * axis + (slice(0, size),)]
        return noise

    def _make_plane(self, number: int) -> Array:
        """A plane of the lattice, smooth within itself; number 0 lies a filter's radius before the first voxel."""
        white = np.random.default_rng((*self._seed, number)).standard_normal(self._coarse, dtype=np.float32)
        smooth: Array = ndimage.gaussian_filter(white, self._sigma[1:], mode="wrap", truncate=_REACH)
        return smooth


class _SlabVolume(Volume):
    """The image or the labels of a stack, to be read by the region; the slab that was read last is kept."""

    def __init__(self, stack: SlabStack, *, is_label: bool) -> None:
        z, y, x = stack.shape
        self._stack, self._is_label = stack, is_label
        self.shape = (1 if is_label else stack.channels, z, y, x)
        self.dtype = np.dtype(np.uint32 if is_label else np.uint16)
        self.spacing_um = (float(stack.spacing[0]), float(stack.spacing[1]), float(stack.spacing[2]))
        self.path = None
        self.chunk_shape = (min(stack.planes, z), y, x)
        self._slab = lru_cache(1)(stack.make_labels if is_label else stack.make_image)

    def read(self, roi: Sequence[int]) -> Array:
        """Make a region; see `Volume.read`."""
        z1, y1, x1, z2, y2, x2 = check_roi(roi, self.shape)
        result = np.empty((self.shape[0], z2 - z1, y2 - y1, x2 - x1), self.dtype)
        if result.size == 0:
            return result
        for slab in range(z1 // self._stack.planes, (z2 - 1) // self._stack.planes + 1):
            first, stop = self._stack.span(slab)
            low, high = max(z1, first), min(z2, stop)
            result[:, low - z1 : high - z1] = self._slab(slab)[:, low - first : high - first, y1:y2, x1:x2]
        return result

    def identity(self) -> dict[str, Any]:
        """What the voxels follow from, in place of the voxels."""
        facts = {"shape": list(self.shape), "dtype": self.dtype.name, "spacing_um": list(self.spacing_um or ())}
        return {**facts, "num_bytes": None, "digest": self._stack.digest}


def _gaussian(sigma: float) -> Array:
    """Weights of a Gaussian filter that sum to 1, float64 [2 r + 1]."""
    radius = int(_REACH * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return weights / weights.sum()
