"""Whether the objects of a scene can be seen: contrast against noise, worked out without making a voxel.

Labels of what nobody can see teach a network to find objects in noise.

It must not know voxels, files or training.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from seg3d_monai.data.synthesis.noise import variation_of_sums
from seg3d_monai.data.synthesis.scene import Recipe, Scene, Seed

MAX_DRAWS = 100
"""Scenes that are drawn for one in which an average object can be seen."""
_BALL = 0.58  # standard deviation over radius of the Gaussian that a point spread dims as much as a ball, on average
Array = np.ndarray


def point_spread_um(scene: Scene, places_um: Array, extent_um: Sequence[float] | Array) -> Array:
    """Standard deviations of the point spread within planes, at places in a volume; micrometres [G].

    Args:
        scene: the scene.
        places_um: [G, 3], (z, y, x) micrometres in the volume.
        extent_um: (z, y, x) of the volume, micrometres.
    """
    optics = scene.optics
    place = np.clip(places_um, 0, extent_um)
    across = 2 * place[:, 2] / extent_um[2] - 1
    deep = 1 - np.exp(-(scene.depth_um + place[:, 0]) / (2 * optics.attenuation_um)) + optics.sheet_end * across**2
    result: Array = optics.psf_um * (1 + np.clip(deep, 0, 1) * (optics.scatter - 1))
    return result


def contrast_to_noise(
    scene: Scene, *, centres_um: Array, radii_um: Array, brightness: Array, extent_um: Sequence[float] | Array
) -> Array:
    """Mean light of objects over that beside them, in standard deviations of a voxel's noise; float64 [G].

    Counted are the stain and its spread by the optics, attenuation, the sheet's ends, shot noise of signal, glow and
    haze, read noise and whole numbers of the camera. Noise that is correlated counts as the white noise that hides an
    object as well. Shapes count as balls; neighbours are left out.

    Args:
        scene: the scene.
        centres_um: [G, 3], (z, y, x) micrometres in the volume.
        radii_um: [G].
        brightness: [G], 1 for an average object.
        extent_um: (z, y, x) of the volume, micrometres.
    """
    stain, optics, camera = scene.stain, scene.optics, scene.camera
    centre = np.clip(centres_um, 0, extent_um)
    depth = scene.depth_um + centre[:, 0]
    across = 2 * centre[:, 2] / extent_um[2] - 1
    sigma = point_spread_um(scene, centres_um, extent_um)
    along_z = sigma * optics.psf_ratio
    size = (_BALL * radii_um) ** 2
    spread = (1 + sigma**2 / size) * np.sqrt(1 + along_z**2 / size)
    # Means over a ball of 1 - h + h r^2 for hollow ones, of 1 + h r^2 for those with a dark rim.
    inside = stain.nucleus * (1 - 0.4 * stain.hollow if stain.hollow > 0 else 1 + 0.6 * stain.hollow)
    membrane = stain.membrane / np.sqrt(1 + 8 * (sigma / stain.membrane_um) ** 2)
    light = camera.photons * np.exp(-depth / optics.attenuation_um) * (1 - optics.vignetting * across**2)
    signal = light * np.maximum(inside * brightness / spread, membrane)
    around = light * (scene.background.glow + optics.haze * scene.objects.fill * stain.nucleus)
    read, step = camera.read_noise / camera.gain, max(camera.counts_a_level, 1.0) / camera.gain
    grain = variation_of_sums((camera.grain_axial, camera.grain, camera.grain))
    noise = np.sqrt((signal + around + read**2) * grain**2 + step**2 / 12)
    contrast: Array = signal / noise
    return contrast


def average_contrast(scene: Scene) -> float:
    """That of an average object in the first plane, in the middle of the sheet."""
    middle = np.array([[0.0, 0.5, 0.5]])
    radius = np.array([scene.objects.diameter_um / 2])
    return float(
        contrast_to_noise(scene, centres_um=middle, radii_um=radius, brightness=np.ones(1), extent_um=np.ones(3))[0]
    )


def visible_scene(recipe: Recipe, seed: Seed) -> Scene:
    """The first scene of a seed, or of the seed and a further number, in which an average object can be seen.

    Raises:
        ValueError: there is none among `MAX_DRAWS`; the message says how much contrast the best one had.
    """
    numbers = (int(seed),) if isinstance(seed, int | np.integer) else tuple(seed)
    best = 0.0
    for draw in range(MAX_DRAWS):
        scene = recipe.scene((*numbers, draw) if draw else numbers)
        contrast = average_contrast(scene)
        if contrast >= scene.camera.least_contrast:
            return scene
        best = max(best, contrast)
    raise ValueError(
        f"camera.least_contrast is {scene.camera.least_contrast:g}, and the best of {MAX_DRAWS} scenes had {best:.2g}; "
        "give it more photons or less depth, or lower it"
    )
