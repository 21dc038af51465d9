"""From maps of foreground and distance to instances by a seeded watershed, and the choice of its thresholds.

Seeds are the local maxima of the distance that a network predicts, so touching nuclei part where it is lowest.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy import ndimage
from skimage.segmentation import watershed

from peers.exchange import Array, Spacing
from seg3d_monai.metrics import InstanceMetrics


@dataclass(frozen=True)
class WatershedSettings:
    """Thresholds of the post-processing.

    Attributes:
        foreground: least probability of a voxel of an object, 0 to 1.
        seed_height: least distance, as a share of the object's largest, at a seed, 0 to 1.
        seed_radius_um: a seed is the largest distance within this reach along each axis, > 0.
        min_voxels: smaller objects are left out.
    """

    foreground: float = 0.5
    seed_height: float = 0.4
    seed_radius_um: float = 3.2
    min_voxels: int = 50


# The middle of each range comes first: it stays where others are no better.
GRID: dict[str, tuple[float, ...]] = {
    "foreground": (0.5, 0.4, 0.6, 0.3, 0.7),
    "seed_height": (0.4, 0.5, 0.3, 0.6),
    "seed_radius_um": (3.2, 2.4, 4.8),
    "min_voxels": (50, 100, 20, 200, 400),
}


@dataclass(frozen=True)
class Maps:
    """What a network says of a volume.

    Attributes:
        foreground: probability that a voxel belongs to an object, float [Z, Y, X].
        distance: distance to the object's surface, as a share of the object's largest, float [Z, Y, X].
        spacing_um: micrometres per voxel (z, y, x).
    """

    foreground: Array
    distance: Array
    spacing_um: Spacing


def instances(maps: Maps, settings: WatershedSettings) -> Array:
    """Labels uint32 [Z, Y, X], 0 background, ids compact from 1."""
    return without_small(parted(maps, settings), settings.min_voxels)


def parted(maps: Maps, settings: WatershedSettings) -> Array:
    """`instances` of any size."""
    foreground = maps.foreground >= settings.foreground
    labels = np.zeros(foreground.shape, dtype=np.int32)
    (box,) = ndimage.find_objects(foreground.astype(np.uint8)) or (None,)
    if box is None:
        return labels
    inside, distance = foreground[box], maps.distance[box]
    size = [2 * max(1, round(settings.seed_radius_um / step)) + 1 for step in maps.spacing_um]
    is_top = (distance == ndimage.maximum_filter(distance, size=size, mode="nearest")) & inside
    # Neighbouring voxels of equal distance are one seed.
    seeds, _ = ndimage.label(is_top & (distance >= settings.seed_height), structure=np.ones((3, 3, 3)))
    labels[box] = watershed(-distance, seeds, mask=inside)
    return labels


def without_small(labels: Array, min_voxels: int) -> Array:
    """Labels without objects of fewer voxels, renumbered from 1."""
    counts = np.bincount(labels.reshape(-1))
    is_kept = counts >= max(1, min_voxels)
    is_kept[0] = False
    table = np.where(is_kept, np.cumsum(is_kept), 0).astype(np.uint32)
    return table[labels]


def tuned(
    maps: Sequence[Maps], truths: Sequence[Array], grid: dict[str, tuple[float, ...]] = GRID
) -> tuple[WatershedSettings, dict[str, Any]]:
    """The settings of a grid that are best by F1 at IoU 0.5 + SEG, pooled over volumes.

    Args:
        maps: of each volume.
        truths: labels of each volume, -1 ignore.
        grid: values of each setting; of several that are equally good the first is taken.

    Returns:
        The settings, and how good they are on these volumes.
    """
    best = WatershedSettings()
    best_facts: dict[str, Any] = {"score": -1.0}
    for settings, labels in candidates(maps, grid):
        for min_voxels in grid["min_voxels"]:
            metrics = InstanceMetrics()
            for truth, one in zip(truths, labels, strict=True):
                metrics.update(truth, without_small(one, int(min_voxels)))
            found = metrics.compute()
            f1, seg = found["thresholds"]["0.5"]["f1"], found["seg"]
            if f1 + seg > best_facts["score"]:
                best = replace(settings, min_voxels=int(min_voxels))
                best_facts = {"score": f1 + seg, "f1_50": f1, "seg": seg, "num_truth": found["num_truth"]}
    return best, {**asdict(best), **best_facts}


def candidates(
    maps: Sequence[Maps], grid: dict[str, tuple[float, ...]]
) -> Iterator[tuple[WatershedSettings, list[Array]]]:
    """Every setting of the grid but the size, and the labels of each volume."""
    for foreground, height, radius in itertools.product(
        grid["foreground"], grid["seed_height"], grid["seed_radius_um"]
    ):
        settings = WatershedSettings(foreground=foreground, seed_height=height, seed_radius_um=radius)
        yield settings, [parted(one, settings) for one in maps]
