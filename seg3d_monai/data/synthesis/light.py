"""From painted objects to camera counts: stain, light, camera.

Everything is a function of the scene and the place of a voxel. Filters need more than a region: `halo` says how much.

It must not know files or training.
"""

from __future__ import annotations

from math import ceil, tan

import numpy as np
import torch
from scipy.special import ndtri

from seg3d_monai.data.blur import filter_along
from seg3d_monai.data.synthesis.cells import Cells, Painted
from seg3d_monai.data.synthesis.noise import between, gaussian, smooth_noise, white_noise
from seg3d_monai.data.synthesis.region import Region
from seg3d_monai.data.synthesis.scene import Camera, Optics, Scene

CHANNELS = ("both", "nucleus", "membrane")
_FINE, _COARSE, _GLOW, _SHADOW, _SHOT, _READ, _BRIGHTNESS = range(10, 17)
"""Streams of draws, after a scene's seed."""
_FINE_SHARE = 0.4  # of the coarser length of the texture
_LIMIT = 2.5  # standard deviations of the texture above which nothing gets brighter or darker
Array = np.ndarray


def brightness(scene: Scene, cells: Cells) -> Array:
    """Brightness by object number, 0 for background; float32 [G + 1]. Daughters are brighter, as condensed."""
    rng = np.random.default_rng((*scene.seed, _BRIGHTNESS))
    spread = scene.stain.brightness_spread
    values = np.exp(spread * rng.standard_normal(cells.num_objects) - spread**2 / 2)
    values[cells.family == 3] *= 1.5
    return np.concatenate([[0], values]).astype(np.float32)


def stained(scene: Scene, painted: Painted, bright: Array, region: Region, spacing_um: Array, channel: str) -> Array:
    """Fluorescence of a region, 1 for an average object; float32 [d, h, w].

    Args:
        scene: the scene.
        painted: the region, painted.
        bright: from `brightness`.
        region: which voxels.
        spacing_um: (z, y, x) micrometres per voxel.
        channel: of `CHANNELS`.
    """
    stain, reach = scene.stain, scene.objects.reach
    share = painted.nearest * np.float32(1 / reach)  # 1 on the surface
    owner = painted.owner(reach)
    result = np.zeros(region.shape, np.float32)
    gap = painted.runner_up - painted.nearest
    if channel != "membrane" and stain.nucleus:
        inner = np.minimum(share, 1)
        inner *= inner
        # Bright rims of the hollow lose nothing, dark rims of the others no more than they have.
        profile = 1 - stain.hollow * (1 - inner) if stain.hollow >= 0 else 1 + stain.hollow * inner
        seam = np.clip(gap / np.float32(stain.seam_share), stain.seam, 1)
        result += np.float32(stain.nucleus) * bright[owner] * profile * seam
        if stain.texture or stain.nucleoli:
            result *= _texture(scene, region, spacing_um)
    if stain.cytoplasm and channel != "membrane":
        around = np.exp(-np.maximum(share - 1, 0) / np.float32(0.25))
        result += np.float32(stain.cytoplasm * stain.nucleus) * around * (owner == 0) * (painted.nearest_object > 0)
    if channel != "nucleus" and stain.membrane:
        # Relative distances become micrometres by the mean radius; half of a gap of two lies on either side.
        scale = np.float32(scene.objects.diameter_um / 2 / stain.membrane_um * 2)
        surface = np.minimum(np.abs(share - 1) * reach, np.where(owner > 0, gap / 2, np.inf))
        result += np.float32(stain.membrane) * np.exp(-((surface * scale) ** 2)) * (painted.nearest_object > 0)
    return result


def _texture(scene: Scene, region: Region, spacing_um: Array) -> Array:
    """What the brightness of insides is multiplied by, 1 on average but for nucleoli; float32 [d, h, w]."""
    stain = scene.stain
    coarse = smooth_noise((*scene.seed, _COARSE), region.start, region.stop, stain.texture_um / spacing_um)
    fine_um = _FINE_SHARE * stain.texture_um
    fine = smooth_noise((*scene.seed, _FINE), region.start, region.stop, fine_um / spacing_um)
    mixed = np.clip(0.7 * (fine + coarse), -_LIMIT, _LIMIT)
    result: Array = np.maximum(1 + np.float32(stain.texture) * mixed, 0.1)
    if stain.nucleoli:
        # The darkest share of the coarse texture, with soft edges.
        edge = np.float32(ndtri(stain.nucleoli))
        result *= np.clip(1 + 2 * (coarse - edge), 0.3, 1)
    return result


def blur_sigmas(optics: Optics, spacing_um: Array) -> tuple[Array, Array]:
    """Standard deviations (z, y, x) in voxels: of the point spread, and of what widens it further."""
    sharp = optics.psf_um * np.array([optics.psf_ratio, 1, 1]) / spacing_um
    return sharp, sharp * max(optics.scatter**2 - 1, 0.0) ** 0.5


def halo(optics: Optics, spacing_um: Array) -> Array:
    """Voxels (z, y, x) that light reaches from one voxel to another, haze left out."""
    reach: Array = np.sum([[len(gaussian(s)) // 2 for s in sigma] for sigma in blur_sigmas(optics, spacing_um)], axis=0)
    reach[2] += ceil(abs(_slope(optics, spacing_um)) * reach[0]) + 1
    return reach


def _slope(optics: Optics, spacing_um: Array) -> float:
    """Voxels along x that the sheet climbs past for each plane, because it is tilted."""
    return tan(optics.tilt_degrees * np.pi / 180) * spacing_um[0] / spacing_um[2]


def blurred(stain: Array, optics: Optics, spacing_um: Array) -> tuple[Array, Array]:
    """The stain through the point spread at the surface, and through that of the depth; edges are 0 outside."""
    slope = _slope(optics, spacing_um)
    image = torch.from_numpy(stain)
    found = []
    for sigma in blur_sigmas(optics, spacing_um):
        kernels = [gaussian(s) for s in sigma]
        image = filter_along(filter_along(image, kernels[2], 2), kernels[1], 1)
        image = _filter_sheared(image, kernels[0], slope) if slope else filter_along(image, kernels[0], 0)
        found.append(image.numpy())
    return found[0], found[1]


def _filter_sheared(image: torch.Tensor, kernel: list[float], slope: float) -> torch.Tensor:
    """Filter along z, where each plane further is shifted by `slope` voxels along x."""
    radius, (depth, _, width) = len(kernel) // 2, image.shape
    result = image * kernel[radius]
    for shift in [*range(-min(radius, depth - 1), 0), *range(1, min(radius, depth - 1) + 1)]:
        whole = int(np.floor(shift * slope))
        part = shift * slope - whole
        for sideways, share in ((whole, 1 - part), (whole + 1, part)):
            if share == 0 or abs(sideways) >= width:
                continue
            to = result.narrow(0, max(0, -shift), depth - abs(shift)).narrow(
                2, max(0, -sideways), width - abs(sideways)
            )
            come = image.narrow(0, max(0, shift), depth - abs(shift)).narrow(2, max(0, sideways), width - abs(sideways))
            to.add_(come, alpha=kernel[radius + shift] * share)
    return result


def haze(haze_um: float, points_um: Array, masses: Array, region: Region, spacing_um: Array) -> Array:
    """Light that is scattered far: that of objects, as points, through a wide Gaussian; float32 [d, h, w].

    It is worked out on a lattice of half its width, and interpolated.

    Args:
        haze_um: standard deviation, micrometres.
        points_um: [G, 3], centres of objects.
        masses: [G], their volumes times their brightness.
        region: which voxels.
        spacing_um: (z, y, x) micrometres per voxel.
    """
    step_um = haze_um / 2
    kernel = gaussian(2.0)
    reach = len(kernel) // 2
    low = np.floor((region.start + 0.5) * spacing_um / step_um).astype(int) - reach
    high = np.floor((region.stop - 0.5) * spacing_um / step_um).astype(int) + 2 + reach
    lattice = np.zeros([int(n) for n in high - low], np.float32)
    cell = np.floor(points_um / step_um + 0.5).astype(int) - low
    inside = ((cell >= 0) & (cell < high - low)).all(axis=1)
    np.add.at(lattice, tuple(cell[inside].T), (masses[inside] / step_um**3).astype(np.float32))
    smooth = torch.from_numpy(lattice)
    for axis in range(3):
        smooth = filter_along(smooth, kernel, axis)
    result: Array = smooth.numpy()
    for axis in range(3):
        places = (np.arange(region.start[axis], region.stop[axis]) + 0.5) * spacing_um[axis] / step_um
        result = between(result, axis, places, int(low[axis]))
    return result


def illuminated(
    scene: Scene, sharp: Array, wide: Array, far: Array, region: Region, spacing_um: Array, width: int, channel: int
) -> Array:
    """Photons that each voxel of a region sends on average.

    Args:
        scene: the scene.
        sharp: [d, h, w], stain through the point spread at the surface.
        wide: [d, h, w], through that of the depth.
        far: [d, h, w], from `haze`.
        region: which voxels.
        spacing_um: (z, y, x) micrometres per voxel.
        width: voxels of the whole volume along x, the sheet's way.
        channel: its number, of the noise.
    """
    optics, back = scene.optics, scene.background
    depth = scene.depth_um + region.centres_um(0, spacing_um)
    across = (2 * (np.arange(region.start[2], region.stop[2]) + 0.5) / width - 1).astype(np.float32)
    scattered = 1 - np.exp(-depth / (2 * optics.attenuation_um))[:, None, None]
    share = np.clip(scattered + np.float32(optics.sheet_end) * across**2, 0, 1)
    light: Array = sharp + share * (wide - sharp)
    if optics.haze:
        light += np.float32(optics.haze) * far
    if back.glow:
        seed = (*scene.seed, _GLOW, channel)
        patches = smooth_noise(seed, region.start, region.stop, back.glow_um / spacing_um) if back.glow_spread else 0
        light += np.float32(back.glow) * np.maximum(1 + np.float32(back.glow_spread) * patches, 0.2)
    light *= np.exp(-depth / np.float32(optics.attenuation_um))[:, None, None]
    light *= 1 - np.float32(optics.vignetting) * across**2
    if optics.stripes:
        seed = (*scene.seed, _SHADOW, channel)
        shadows = smooth_noise(seed, region.start[:2], region.stop[:2], optics.stripe_um / spacing_um[:2])
        light *= np.clip(1 + np.float32(optics.stripes) * shadows, 0.3, None)[:, :, None]
    light *= np.float32(scene.camera.photons)
    return light


def recorded(scene: Scene, light: Array, region: Region, channel: int) -> Array:
    """What the camera counts of so many photons, uint16 [d, h, w].

    Shot noise is a normal number squared, with Poisson's mean and variance, and skewed to the same side; so each
    voxel's is a function of its place.
    """
    camera = scene.camera
    shot, read = (white_noise((*scene.seed, stream, channel), region.start, region.stop) for stream in (_SHOT, _READ))
    root = np.maximum(np.sqrt(light + np.float32(3 / 8)) + shot / 2, 0)
    counts = np.float32(camera.gain) * (root * root - np.float32(5 / 8)) + np.float32(camera.offset)
    counts += np.float32(camera.read_noise) * read
    return digitised(counts, camera)


def digitised(counts: Array, camera: Camera) -> Array:
    """Counts as whole numbers of the camera, uint16: cut off where it saturates, and coarser with fewer bits."""
    white = min(camera.offset + camera.gain * camera.photons * camera.white_level, 65535.0)
    levels = 2.0 ** round(camera.bits) - 1
    scale = levels / white if levels < white else 1.0
    return np.rint(np.clip(counts, 0, white) * np.float32(scale)).astype(np.uint16)
