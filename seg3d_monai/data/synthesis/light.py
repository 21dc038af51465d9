"""From painted objects to camera counts: stain, light, camera.

Everything is a function of the scene and the place of a voxel. Filters need more than a region: `halo` says how much.

It must not know files or training.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, log, tan

import numpy as np
import torch
from scipy.special import ndtri

from seg3d_monai.data.blur import filter_along
from seg3d_monai.data.synthesis.cells import Cells, Painted
from seg3d_monai.data.synthesis.noise import between, filtered_noise, gaussian, smooth_noise, white_noise
from seg3d_monai.data.synthesis.region import Region
from seg3d_monai.data.synthesis.scene import Camera, Optics, Scene

CHANNELS = ("both", "nucleus", "membrane")
_FINE, _COARSE, _GLOW, _SHADOW, _SHOT, _READ, _BRIGHTNESS = range(10, 17)
"""Streams of draws, after a scene's seed."""
_FINE_SHARE = 0.4  # of the coarser length of the texture
_LIMIT = 2.5  # standard deviations of the texture above which nothing gets brighter or darker
_RIM = 1.35  # reaches of an object, as far as its cytoplasm is painted
_DARK = 2.5  # half thicknesses, beyond which a membrane is dark: exp(-6)
_WINGS_END = 5.0
Array = np.ndarray


def painted_range(scene: Scene) -> tuple[float, float]:
    """What `stained` needs of a `Painter`: its limit, and its gap."""
    stain, reach = scene.stain, scene.objects.reach
    gap = stain.seam_share if stain.nucleus and stain.seam < 1 else 0.01
    limit = reach + gap
    if stain.membrane:
        # Half a gap of two counts where it is less than the way to the own surface: runners-up lie before twice the
        # reach less the nearest.
        away = _DARK / _membranes_in_radius(scene)
        limit, gap = max(limit, reach + away), max(gap, 2 * away)
    return (max(limit, _RIM * reach) if stain.cytoplasm else limit), gap


def _membranes_in_radius(scene: Scene) -> float:
    """Mean radius of an object, in half thicknesses of its membrane."""
    return scene.objects.diameter_um / 2 / scene.stain.membrane_um * 2


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
    gap = painted.runner_up - painted.nearest
    if channel != "membrane" and stain.nucleus:
        inner = np.minimum(share, 1)
        inner *= inner
        # Bright rims of the hollow lose nothing, dark rims of the others no more than they have.
        inner *= np.float32(stain.hollow)
        inner += np.float32(1 - max(stain.hollow, 0.0))
        result = bright[owner]
        result *= np.float32(stain.nucleus)
        result *= inner
        seam = np.multiply(gap, np.float32(1 / stain.seam_share), out=inner)
        result *= np.clip(seam, stain.seam, 1, out=seam)
        if stain.texture or stain.nucleoli:
            result *= _texture(scene, region, spacing_um)
    else:
        result = np.zeros(region.shape, np.float32)
    if stain.cytoplasm and channel != "membrane":
        around = np.exp(-np.maximum(share - 1, 0) / np.float32(0.25))
        result += np.float32(stain.cytoplasm * stain.nucleus) * around * (owner == 0) * (painted.nearest_object > 0)
    if channel != "nucleus" and stain.membrane:
        # Relative distances become micrometres by the mean radius; half of a gap of two lies on either side.
        scale = np.float32(_membranes_in_radius(scene))
        share -= 1
        surface = np.abs(share, out=share)
        surface *= np.float32(reach)
        gap /= 2
        gap[owner == 0] = np.inf
        np.minimum(surface, gap, out=surface)
        surface *= scale
        surface *= -surface
        np.exp(surface, out=surface)
        surface *= np.float32(stain.membrane)
        surface[painted.nearest_object == 0] = 0
        result += surface
    return result


def _texture(scene: Scene, region: Region, spacing_um: Array) -> Array:
    """What the brightness of insides is multiplied by, 1 on average but for nucleoli; float32 [d, h, w]."""
    stain = scene.stain
    coarse = smooth_noise((*scene.seed, _COARSE), region.start, region.stop, stain.texture_um / spacing_um)
    fine_um = _FINE_SHARE * stain.texture_um
    fine = smooth_noise((*scene.seed, _FINE), region.start, region.stop, fine_um / spacing_um)
    fine = fine + coarse
    fine *= np.float32(0.7)
    np.clip(fine, -_LIMIT, _LIMIT, out=fine)
    fine *= np.float32(stain.texture)
    fine += 1
    result: Array = np.maximum(fine, np.float32(0.1), out=fine)
    if stain.nucleoli:
        # The darkest share of the coarse texture, with soft edges.
        edge = np.float32(ndtri(stain.nucleoli))
        coarse = coarse - edge
        coarse *= 2
        coarse += 1
        result *= np.clip(coarse, 0.3, 1, out=coarse)
    return result


def blur_sigmas(optics: Optics, spacing_um: Array) -> tuple[Array, Array]:
    """Standard deviations (z, y, x) of the point spread in voxels: at the surface, and of the depth."""
    sharp = optics.psf_um * np.array([optics.psf_ratio, 1, 1]) / spacing_um
    return sharp, sharp * optics.scatter


def axial(sigma: float, wings: float, wings_ratio: float) -> list[float]:
    """Weights of the point spread along z that sum to 1, an odd number of them.

    Args:
        sigma: standard deviation of its middle, in voxels.
        wings: share of the light in a Lorentzian, which falls to 0 at `_WINGS_END` of its half-widths.
        wings_ratio: half-width of that, at half maximum, over that of the middle.
    """
    middle = gaussian(sigma)
    half = (2 * log(2)) ** 0.5 * sigma * wings_ratio
    reach = floor(_WINGS_END * half)
    if not wings or len(middle) == 1:
        return middle
    places = np.arange(-reach, reach + 1)
    weights = 1 / (1 + (places / half) ** 2) - 1 / (1 + _WINGS_END**2)
    weights *= wings / weights.sum()
    weights[reach - len(middle) // 2 : reach + len(middle) // 2 + 1] += (1 - wings) * np.array(middle)
    return [float(weight) for weight in weights]


def _kernels(sigma: Array, optics: Optics) -> tuple[list[float], list[float], list[float]]:
    along_z = axial(float(sigma[0]), optics.wings, optics.wings_ratio)
    return along_z, gaussian(float(sigma[1])), gaussian(float(sigma[2]))


def halo(optics: Optics, spacing_um: Array) -> Array:
    """Voxels (z, y, x) that light reaches from one voxel to another, haze left out."""
    sigmas = blur_sigmas(optics, spacing_um)
    reach: Array = np.max([[len(kernel) // 2 for kernel in _kernels(sigma, optics)] for sigma in sigmas], axis=0)
    reach[2] += ceil(abs(_slope(optics, spacing_um)) * reach[0]) + 1
    return reach


def _slope(optics: Optics, spacing_um: Array) -> float:
    """Voxels along x that the sheet climbs past for each plane, because it is tilted."""
    return tan(optics.tilt_degrees * np.pi / 180) * spacing_um[0] / spacing_um[2]


def blurred(stain: Array, optics: Optics, spacing_um: Array) -> tuple[Array, Array]:
    """The stain through the point spread at the surface, and through that of the depth; edges are 0 outside."""
    slope = _slope(optics, spacing_um)
    found: list[Array] = []
    for sigma in blur_sigmas(optics, spacing_um):
        if found and optics.scatter == 1:
            return found[0], found[0]
        kernels = _kernels(sigma, optics)
        image = filter_along(filter_along(torch.from_numpy(stain), kernels[2], 2), kernels[1], 1)
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
    for axis in (2, 1, 0):
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
    shot, read = (_grains(camera, (*scene.seed, stream, channel), region) for stream in (_SHOT, _READ))
    root = np.maximum(np.sqrt(light + np.float32(3 / 8)) + shot / 2, 0)
    counts = np.float32(camera.gain) * (root * root - np.float32(5 / 8)) + np.float32(camera.offset)
    counts += np.float32(camera.read_noise) * read
    return digitised(counts, camera)


def _grains(camera: Camera, seed: Sequence[int], region: Region) -> Array:
    """Noise of unit variance, as far correlated as the camera's is; float32 [d, h, w]."""
    if not (camera.grain or camera.grain_axial):
        return white_noise(seed, region.start, region.stop)
    return filtered_noise(seed, region.start, region.stop, (camera.grain_axial, camera.grain, camera.grain))


def digitised(counts: Array, camera: Camera) -> Array:
    """Counts as whole numbers of the camera, uint16: cut off where it saturates, and coarser with fewer bits."""
    scale = np.float32(1 / max(camera.counts_a_level, 1.0))
    return np.rint(np.clip(counts, 0, camera.white_count) * scale).astype(np.uint16)
