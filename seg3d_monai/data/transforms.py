"""The default augmentation of training crops, built out of MONAI's dictionary transforms.

Geometry first, on image and label together, then intensity, on the image alone and only on what geometry left of it.
Geometry works in the voxel frame and turns within the yx plane only: z has another resolution, and a light sheet
another blur.

Labels are ids, not intensities: they arrive compact (so that float32, through which MONAI resamples, holds them
exactly), are sampled by nearest neighbour, and are shifted by one meanwhile so that what comes in from outside is
ignore (-1) rather than background.

Must not know: files, the crop index, targets.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from monai.transforms import (
    Compose,
    MapTransform,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandomizableTransform,
    RandRotate90d,
    RandScaleIntensityd,
    RandShiftIntensityd,
)

from seg3d_monai.data.targets import IGNORE

_EXACT_IDS = 1 << 24  # float32 holds every integer up to here


class RandTurnPlaned(RandRotate90d):
    """Turn by 0, 90, 180 or 270 degrees in the yx plane; crops that are not square there are left as they are."""

    def __init__(self, *, keys: Sequence[str] = ("image", "label"), prob: float = 0.75) -> None:
        super().__init__(keys=keys, prob=prob, max_k=3, spatial_axes=(1, 2))

    def __call__(self, data: Mapping[Hashable, torch.Tensor], lazy: bool | None = None) -> Any:
        shapes = {tuple(data[key].shape[-2:]) for key in self.keys}
        if any(height != width for height, width in shapes):
            return dict(data)
        return super().__call__(data, lazy=lazy)


class RandPlaneAffined(RandomizableTransform, MapTransform):
    """Rotate about z by a small angle and zoom each axis, then crop at the centre.

    Args:
        crop_size: (z, y, x) voxels that are kept, None for all; only these are computed.
        prob: probability of rotating and zooming; else the crop is only cut out.
        rotate_degrees: largest angle about z, either way.
        scale_range: smallest and largest magnification of an object along (z, y, x), each pair around 1.
        image_key: float [C, D, H, W], sampled trilinearly; 0 comes in from outside.
        label_key: integer [1, D, H, W] with -1 for ignore; nearest neighbour; -1 comes in from outside.

    Raises:
        ValueError: for a magnification that is not positive, or labels that float32 does not hold exactly.
    """

    def __init__(
        self,
        *,
        crop_size: Sequence[int] | None = None,
        prob: float = 0.5,
        rotate_degrees: float = 15.0,
        scale_range: Sequence[Sequence[float]] = ((0.9, 1.1), (0.85, 1.2), (0.85, 1.2)),
        image_key: str = "image",
        label_key: str = "label",
    ) -> None:
        MapTransform.__init__(self, (image_key, label_key))
        RandomizableTransform.__init__(self, prob)
        if len(scale_range) != 3 or any(not 0 < low <= high for low, high in scale_range):
            raise ValueError(
                f"scale_range={scale_range} is not three pairs 0 < low <= high; give magnifications along (z, y, x)"
            )
        self.crop_size = None if crop_size is None else tuple(int(n) for n in crop_size)
        self._image_key, self._label_key = image_key, label_key
        # MONAI maps output to input: it adds 1 to a drawn number and reads the input at that multiple.
        inverse = [(1.0 / high - 1.0, 1.0 / low - 1.0) for low, high in scale_range]
        self._affine = RandAffined(
            keys=(image_key, label_key),
            spatial_size=self.crop_size,
            prob=1.0,
            rotate_range=(float(np.deg2rad(rotate_degrees)), 0.0, 0.0),
            scale_range=inverse,
            mode=("bilinear", "nearest"),
            padding_mode="zeros",
        )

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> Self:
        """Seed this transform and the one within; see MONAI's Randomizable."""
        super().set_random_state(seed, state)
        self._affine.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Transform one sample."""
        result = dict(data)
        self.randomize(None)
        if not self._do_transform:
            for key in (self._image_key, self._label_key):
                result[key] = _centre(result[key], self.crop_size)
            return result
        label = result[self._label_key]
        if int(label.max()) >= _EXACT_IDS:
            raise ValueError(
                f"labels reach {int(label.max())} and float32 holds ids below {_EXACT_IDS}; renumber them from 1"
            )
        sampled = self._affine(
            {self._image_key: result[self._image_key], self._label_key: (label - IGNORE).to(torch.float32)}
        )
        result[self._image_key] = _plain(sampled[self._image_key])
        result[self._label_key] = _plain(sampled[self._label_key]).to(label.dtype) + IGNORE
        return result


def train_transforms(
    *,
    crop_size: Sequence[int] | None = None,
    isotropic_plane: bool = True,
    flip: bool = True,
    affine_prob: float = 0.5,
    rotate_degrees: float = 15.0,
    scale_range: Sequence[Sequence[float]] = ((0.9, 1.1), (0.85, 1.2), (0.85, 1.2)),
    intensity_prob: float = 0.3,
    gamma_range: Sequence[float] = (0.7, 1.5),
    intensity_scale: Sequence[float] = (0.4, 1.4),
    intensity_shift: float = 0.1,
    noise_std: float = 0.1,
    blur_sigma: Sequence[float] = (0.3, 1.0),
) -> Compose:
    """Compose the default training augmentation on {"image": float32 [C, D, H, W], "label": int32 [1, D, H, W]}.

    Args:
        crop_size: (z, y, x) voxels left of a crop that was read with a margin; None keeps the size.
        isotropic_plane: whether y and x have one voxel size; only then are there turns in the plane.
        flip: whether to flip along z, y and x, each with probability 1/2.
        affine_prob: probability of rotating and zooming, 0 to 1.
        rotate_degrees: largest angle about z.
        scale_range: magnifications along (z, y, x).
        intensity_prob: probability of each of gamma, scale, shift, noise and blur, 0 to 1.
        gamma_range: smallest and largest exponent.
        intensity_scale: smallest and largest factor of the contrast.
        intensity_shift: largest shift, in normalised units.
        noise_std: largest standard deviation of Gaussian noise, in normalised units.
        blur_sigma: smallest and largest Gaussian blur in y and x, voxels; half of it in z.

    Returns:
        A MONAI Compose; `set_random_state` makes the next call reproducible.

    Raises:
        ValueError: for a magnification that is not positive.
    """
    keys = ("image", "label")
    low, high = (float(sigma) for sigma in blur_sigma)
    steps: list[Callable[..., Any]] = []
    if flip:
        steps += [RandFlipd(keys=keys, prob=0.5, spatial_axis=axis) for axis in range(3)]
    if isotropic_plane:
        steps.append(RandTurnPlaned(keys=keys))
    steps += [
        RandPlaneAffined(
            crop_size=crop_size,
            prob=affine_prob,
            rotate_degrees=rotate_degrees if isotropic_plane else 0.0,
            scale_range=scale_range,
        ),
        # MONAI calls the first spatial axis x; it is z here.
        RandGaussianSmoothd(
            keys="image", prob=intensity_prob, sigma_x=(low / 2, high / 2), sigma_y=(low, high), sigma_z=(low, high)
        ),
        RandAdjustContrastd(keys="image", prob=intensity_prob, gamma=(float(gamma_range[0]), float(gamma_range[1]))),
        RandScaleIntensityd(
            keys="image", prob=intensity_prob, factors=(intensity_scale[0] - 1, intensity_scale[1] - 1)
        ),
        RandShiftIntensityd(keys="image", prob=intensity_prob, offsets=intensity_shift),
        RandGaussianNoised(keys="image", prob=intensity_prob, std=noise_std),
    ]
    return Compose(steps)


def _centre(tensor: torch.Tensor, size: Sequence[int] | None) -> torch.Tensor:
    for axis, wanted in enumerate(size or (), start=1):
        surplus = tensor.shape[axis] - wanted
        if surplus > 0:
            tensor = tensor.narrow(axis, surplus // 2, wanted)
    return tensor


def _plain(tensor: Any) -> torch.Tensor:
    """A plain tensor: MONAI's carries metadata that costs time in every later operation."""
    return tensor.as_tensor() if hasattr(tensor, "as_tensor") else torch.as_tensor(tensor)
