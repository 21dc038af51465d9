"""A recipe whose volumes look like a given image.

Scenes are drawn, made and compared by their statistics; the ranges of those that come nearest are drawn from next (a
population approach to rejection sampling, Beaumont et al. 2009). Labels are not needed.

It must not know files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from seg3d_monai.data.synthesis.ranges import Given
from seg3d_monai.data.synthesis.scene import GROUPS, Recipe, Scene
from seg3d_monai.data.synthesis.stack import SyntheticStack
from seg3d_monai.data.synthesis.statistics import Statistics, measure

MATCHED = ("objects", "stain", "background", "optics", "camera")
CROP_SIZE = (40, 72, 72)
Array = np.ndarray


@dataclass(frozen=True)
class Match:
    """What was found.

    Attributes:
        recipe: its ranges are those of the nearest scenes.
        scene: the nearest.
        wanted: statistics of the image.
        found: statistics of the nearest scene.
        distances: of the nearest scenes of each round, by their mean.
    """

    recipe: Recipe
    scene: Scene
    wanted: Statistics
    found: Statistics
    distances: tuple[float, ...]


def match_recipe(
    image: Array,
    spacing_um: Sequence[float],
    start: Recipe,
    *,
    rounds: int = 4,
    num_scenes: int = 150,
    num_kept: int = 12,
    seed: int = 0,
    crop_size: Sequence[int] = CROP_SIZE,
    report: Callable[[str], None] | None = None,
) -> Match:
    """Narrow a recipe's ranges to scenes that look like an image.

    Args:
        image: [Z, Y, X], a typical part of the data; numbers of the camera.
        spacing_um: its (z, y, x) micrometres per voxel.
        start: where scenes are drawn first. What it gives as numbers stays as it is.
        rounds: how often ranges are narrowed, from 1.
        num_scenes: drawn each round.
        num_kept: the nearest, of all rounds, whose ranges are drawn from next; from 2 to `num_scenes`.
        seed: of all draws.
        crop_size: (z, y, x) voxels of the scenes that are compared with the image, at most its own.
        report: called with a line for each round.

    Raises:
        ValueError: an argument out of range, an image that `measure` refuses, or no scene of the recipe that fits.
    """
    if seed < 0:
        raise ValueError(f"seed={seed} is negative; give 0 or more")
    if rounds < 1 or not 2 <= num_kept <= num_scenes:
        raise ValueError(
            f"rounds={rounds}, num_scenes={num_scenes}, num_kept={num_kept}: give 1 or more, and 2 to num_scenes"
        )
    wanted = measure(image)
    z, y, _ = (float(size) for size in spacing_um)
    # The image's own counts are whole numbers already.
    recipe = _changed(start, {"voxels": {"plane_um": y, "anisotropy": z / y}, "camera": {"bits": 16.0}})
    size = tuple(min(a, b) for a, b in zip(crop_size, image.shape, strict=True))
    kept: list[tuple[float, Scene, Statistics]] = []
    distances = []
    for number in range(rounds):
        for draw in range(num_scenes):
            made = _made(recipe.scene((seed, number, draw)), size, wanted)
            if made is not None:
                kept.append((wanted.distance(made[1]), *made))
        if len(kept) < 2:
            raise ValueError(
                f"of {num_scenes} scenes at {list(spacing_um)} micrometres per voxel none fits into an image of "
                f"{image.shape} voxels; give a larger one, or a recipe of smaller objects"
            )
        kept = sorted(kept, key=lambda one: one[0])[:num_kept]
        distances.append(float(np.mean([one[0] for one in kept])))
        if report is not None:
            report(
                f"round {number + 1} of {rounds}: distance {kept[0][0]:.3f}, mean of {len(kept)} {distances[-1]:.3f}"
            )
        recipe = _around([scene for _, scene, _ in kept], recipe)
    return Match(recipe, kept[0][1], wanted, kept[0][2], tuple(distances))


def _made(scene: Scene, size: Sequence[int], wanted: Statistics) -> tuple[Scene, Statistics] | None:
    """A scene with the camera's counts set to the image's, and its statistics; None where it cannot be made."""
    try:
        image = SyntheticStack(scene, size, any_density=True).whole()[0][0]
        found = measure(image)
    except ValueError:
        return None
    scale = (wanted.high - wanted.low) / (found.high - found.low)
    offset = wanted.low - scale * (found.low - scene.camera.offset)
    try:
        camera = replace(
            scene.camera,
            gain=scene.camera.gain * scale,
            read_noise=scene.camera.read_noise * scale,
            offset=max(offset, 0.0),
        )
    except ValueError:
        return None
    return replace(scene, camera=camera), found


def _around(scenes: Sequence[Scene], recipe: Recipe) -> Recipe:
    """A recipe of the ranges of some scenes, where the recipe has ranges; the camera's counts are always taken."""
    ranges: dict[str, dict[str, Given]] = {}
    for name in MATCHED:
        for known in fields(GROUPS[name]):
            values = [getattr(getattr(scene, name), known.name) for scene in scenes]
            is_free = isinstance(recipe.ranges[name][known.name], tuple)
            if is_free or (name == "camera" and known.name in ("gain", "offset", "read_noise")):
                ranges.setdefault(name, {})[known.name] = (min(values), max(values))
    depths = [scene.depth_um for scene in scenes]
    return _changed(recipe, ranges, (min(depths), max(depths)) if isinstance(recipe.depth_um, tuple) else None)


def _changed(recipe: Recipe, ranges: dict[str, dict[str, Given]], depth_um: Given | None = None) -> Recipe:
    merged = {name: {**recipe.ranges[name], **ranges.get(name, {})} for name in GROUPS}
    return Recipe(merged, recipe.depth_um if depth_um is None else depth_um)
