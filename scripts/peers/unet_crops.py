"""Training crops of the U-Net: drawn by nucleus, augmented by MONAI's transforms, with foreground and distance.

The distance is taken once a volume, on whole nuclei: one that a crop cuts keeps its true distances.
"""

from collections.abc import Sequence

import numpy as np
import torch
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandRotate90d,
    RandScaleIntensityd,
    RandShiftIntensityd,
)
from scipy import ndimage
from torch import Tensor

from peers.exchange import IGNORE, Array, RaceVolume, Spacing
from seg3d_monai.data import ArrayVolume, measure_intensity

MARGIN = (4, 16, 16)
"""Voxels read around a crop on every side, so that a rotation or a smaller scale brings in neighbours."""
FOREGROUND_PROB = 0.75
MAGNIFICATION = ((0.8, 1.15), (0.85, 1.2), (0.85, 1.2))
INTENSITY_PROB = 0.4
"""Magnifications, the probability of changes of intensity and FOREGROUND_PROB are those of overlay data_bbbc050."""


def normalised(image: Array) -> Array:
    """Raw voxels [Z, Y, X] -> float32, percentiles 1 and 99.8 to 0 and 1, as ours does it."""
    intensity = measure_intensity(ArrayVolume(image), percentiles=(1.0, 99.8))
    return intensity.normalise(image[None])[0]


def distance_map(labels: Array, spacing_um: Spacing) -> Array:
    """Distance of each voxel of an object to its surface, as a share of the object's largest; 0 outside.

    Args:
        labels: [Z, Y, X], 0 background, -1 ignore.
        spacing_um: micrometres per voxel (z, y, x).

    Returns:
        float16 [Z, Y, X] in [0, 1]. The volume's edge is not a surface.
    """
    found = np.zeros(labels.shape, dtype=np.float16)
    for number, box in enumerate(ndimage.find_objects(np.maximum(labels, 0)), start=1):
        if box is None:
            continue
        around = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in box)
        inside = labels[around] == number
        # Without a voxel outside there is no surface to measure from.
        distance = inside.astype(float) if inside.all() else ndimage.distance_transform_edt(inside, spacing_um)
        found[around][inside] = (distance / distance.max())[inside]
    return found


class TrainingCrops:
    """Random augmented crops; each is a function of (seed, number).

    Args:
        volumes: at least one.
        crop_size: (z, y, x) voxels.
        seed: of every draw.
    """

    def __init__(self, *, volumes: Sequence[RaceVolume], crop_size: Sequence[int], seed: int) -> None:
        self.crop_size = tuple(crop_size)
        self.seed = seed
        self._images = [normalised(volume.image) for volume in volumes]
        self._distances = [distance_map(volume.labels, volume.spacing_um) for volume in volumes]
        self._kinds = [np.sign(volume.labels).astype(np.int8) for volume in volumes]
        boxes = [ndimage.find_objects(np.maximum(volume.labels, 0)) for volume in volumes]
        self._nuclei = [
            (position, [(side.start + side.stop) // 2 for side in box])
            for position, found in enumerate(boxes)
            for box in found
            if box is not None
        ]
        self._augment = augmentation(self.crop_size)

    def batch(self, number: int, size: int) -> dict[str, Tensor]:
        """Crops number * size and on: image, distance, kind (-1 ignore, 0 background, 1), each [size, 1, D, H, W]."""
        crops = [self.crop(number * size + position) for position in range(size)]
        return {key: torch.stack([crop[key] for crop in crops]) for key in crops[0]}

    def crop(self, number: int) -> dict[str, Tensor]:
        """One crop: image, distance and kind, float32 [1, D, H, W]."""
        rng = np.random.default_rng([self.seed, number])
        if self._nuclei and rng.random() < FOREGROUND_PROB:
            position, centre = self._nuclei[rng.integers(len(self._nuclei))]
            reach = [size // 3 for size in self.crop_size]
            middle = [at + int(rng.integers(-far, far + 1)) for at, far in zip(centre, reach, strict=True)]
        else:
            position = int(rng.integers(len(self._images)))
            middle = [int(rng.integers(extent)) for extent in self._images[position].shape]
        start = self._start(self._images[position].shape, middle)
        data = {
            "image": self._cut(self._images[position], start, 0.0),
            "distance": self._cut(self._distances[position].astype(np.float32), start, 0.0),
            "kind": self._cut(self._kinds[position].astype(np.float32), start, float(IGNORE)),
        }
        self._augment.set_random_state(seed=int(rng.integers(2**32)))
        return {key: torch.as_tensor(value).float() for key, value in self._augment(data).items()}

    def _start(self, shape: Sequence[int], middle: Sequence[int]) -> list[int]:
        """First voxel of the crop with its margin, which may be negative; the crop itself leaves no volume it fits."""
        starts = []
        for extent, at, size, margin in zip(shape, middle, self.crop_size, MARGIN, strict=True):
            inside = min(max(at - size // 2, 0), extent - size) if extent >= size else (extent - size) // 2
            starts.append(inside - margin)
        return starts

    def _cut(self, array: Array, start: Sequence[int], outside: float) -> Tensor:
        full = np.full([size + 2 * margin for size, margin in zip(self.crop_size, MARGIN, strict=True)], outside)
        inner, outer = [], []
        for first, length, extent in zip(start, full.shape, array.shape, strict=True):
            low, high = max(first, 0), min(first + length, extent)
            outer.append(slice(low, high))
            inner.append(slice(low - first, high - first))
        full[tuple(inner)] = array[tuple(outer)]
        return torch.from_numpy(full[None]).float()


def augmentation(crop_size: Sequence[int]) -> Compose:
    """What ours may do too: flips, turns in the plane, rotation and scale, then blur, gamma, contrast, shift, noise."""
    keys = ("image", "distance", "kind")
    # The matrix of RandAffined maps the crop to what was read: its scales are one over the magnification, less one.
    scales = [(1 / high - 1, 1 / low - 1) for low, high in MAGNIFICATION]
    return Compose(
        [
            *(RandFlipd(keys=keys, prob=0.5, spatial_axis=axis) for axis in range(3)),
            RandRotate90d(keys=keys, prob=0.75, spatial_axes=(1, 2)),
            RandAffined(
                keys=keys,
                prob=0.5,
                rotate_range=[(-np.pi / 12, np.pi / 12), 0.0, 0.0],
                scale_range=scales,
                spatial_size=tuple(crop_size),
                mode=("bilinear", "bilinear", "nearest"),
                padding_mode="border",
            ),
            RandGaussianSmoothd(
                keys="image", prob=INTENSITY_PROB, sigma_x=(0.15, 0.5), sigma_y=(0.3, 1.0), sigma_z=(0.3, 1.0)
            ),
            RandAdjustContrastd(keys="image", prob=INTENSITY_PROB, gamma=(0.7, 1.5)),
            RandScaleIntensityd(keys="image", prob=INTENSITY_PROB, factors=(-0.6, 0.4)),
            RandShiftIntensityd(keys="image", prob=INTENSITY_PROB, offsets=0.1),
            RandGaussianNoised(keys="image", prob=INTENSITY_PROB, std=0.15),
        ]
    )
