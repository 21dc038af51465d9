"""The augmentation of training crops, built out of MONAI's dictionary transforms and a few like them.

Geometry first, on image and label together, then intensity, on the image alone and only on what geometry left of it.
By default crops are turned within the yx plane only: z has another resolution, and a light sheet another blur.

Must not know: files, the crop index, targets.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from monai.data import get_track_meta, set_track_meta
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandFlipd,
    Randomizable,
    RandScaleIntensityd,
    RandShiftIntensityd,
)

from seg3d_monai.data.transforms_geometry import RandTurnPlaned, RandWarpd
from seg3d_monai.data.transforms_intensity import RandBlurd, RandChannelDropd, RandCoarseZd, RandNoised

__all__ = [
    "RandBlurd",
    "RandChannelDropd",
    "RandCoarseZd",
    "RandNoised",
    "RandTurnPlaned",
    "RandWarpd",
    "train_transforms",
]


class SeededCompose(Compose):
    """MONAI's Compose, spared what took a third of a sample's time: a generator for each transform, and metadata."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Transform one sample; what comes back are plain tensors."""
        is_tracked = get_track_meta()
        set_track_meta(False)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            set_track_meta(is_tracked)

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> "SeededCompose":
        """Give all transforms the generator."""
        Randomizable.set_random_state(self, seed=seed, state=state)
        for transform in self.transforms:
            if isinstance(transform, Randomizable):
                transform.set_random_state(state=self.R)
        return self


def train_transforms(
    *,
    crop_size: Sequence[int] | None = None,
    spacing_um: Sequence[float] | None = None,
    isotropic_plane: bool = True,
    flip_prob: Sequence[float] = (0.5, 0.5, 0.5),
    turn_prob: float = 0.75,
    turn_planes: Sequence[str] = ("yx",),
    affine_prob: float = 0.5,
    rotate_degrees: float = 15.0,
    scale_range: Sequence[Sequence[float]] = ((0.9, 1.1), (0.85, 1.2), (0.85, 1.2)),
    tilt_degrees: float = 0.0,
    shear: float = 0.0,
    elastic_prob: float = 0.0,
    elastic_um: Sequence[float] = (0.0, 3.0),
    elastic_period_um: float = 12.0,
    intensity_prob: float = 0.3,
    blur_prob: float | None = None,
    blur_sigma: Sequence[float] = (0.3, 1.0),
    coarse_z_prob: float = 0.0,
    coarse_z_range: Sequence[float] = (1.5, 3.0),
    gamma_prob: float | None = None,
    gamma_range: Sequence[float] = (0.7, 1.5),
    contrast_prob: float | None = None,
    intensity_scale: Sequence[float] = (0.4, 1.4),
    shift_prob: float | None = None,
    intensity_shift: float = 0.1,
    noise_prob: float | None = None,
    noise_std: float = 0.1,
    channel_drop_prob: float = 0.0,
) -> SeededCompose:
    """Compose the training augmentation on {"image": float32 [C, D, H, W], "label": int32 [1, D, H, W]}.

    A sample may also bring "spacing_um", [3] micrometres per voxel along (z, y, x). Probabilities are 0 to 1.

    Args:
        crop_size: (z, y, x) voxels left of a crop that was read with a margin; None keeps the size.
        spacing_um: micrometres per voxel (z, y, x) of samples that do not bring theirs; None takes cubes of 1.
        isotropic_plane: whether y and x have one voxel size; only then are there turns and rotations by voxels.
        flip_prob: probabilities of flips along (z, y, x).
        turn_prob: probability of a turn by 90, 180 or 270 degrees in each of `turn_planes`.
        turn_planes: "yx", "zy", "zx"; those whose voxel sizes or extents differ in a sample are left out.
        affine_prob: probability of rotating and zooming, and of tilting and shearing where these are asked for.
        rotate_degrees: largest angle about z.
        scale_range: magnifications along (z, y, x).
        tilt_degrees: largest angles about y and x.
        shear: largest shift of one axis per unit of another.
        elastic_prob: probability of a smooth random bending; see `RandWarpd`.
        elastic_um: its smallest and largest amplitude.
        elastic_period_um: distance over which it changes.
        intensity_prob: probability of each of blur, gamma, contrast, shift and noise that has none of its own.
        blur_prob: of a blur.
        blur_sigma: smallest and largest Gaussian blur in y and x, voxels; half of it in z.
        coarse_z_prob: of averaging over thick slabs along z.
        coarse_z_range: smallest and largest thickness of a slab, planes.
        gamma_prob: of a gamma.
        gamma_range: smallest and largest exponent.
        contrast_prob: of another contrast.
        intensity_scale: smallest and largest factor of the contrast.
        shift_prob: of a shift.
        intensity_shift: largest shift, in normalised units.
        noise_prob: of noise.
        noise_std: largest standard deviation of Gaussian noise, in normalised units.
        channel_drop_prob: of blanking one channel of several.

    Returns:
        A MONAI Compose; its `set_random_state` makes the next call reproducible.

    Raises:
        ValueError: for numbers out of range; the message names them.
    """
    probabilities = {
        "turn_prob": turn_prob,
        "affine_prob": affine_prob,
        "elastic_prob": elastic_prob,
        "intensity_prob": intensity_prob,
        "blur_prob": blur_prob,
        "coarse_z_prob": coarse_z_prob,
        "gamma_prob": gamma_prob,
        "contrast_prob": contrast_prob,
        "shift_prob": shift_prob,
        "noise_prob": noise_prob,
        "channel_drop_prob": channel_drop_prob,
        **{f"flip_prob[{axis}]": prob for axis, prob in enumerate(flip_prob)},
    }
    for name, prob in probabilities.items():
        if prob is not None and not 0.0 <= prob <= 1.0:
            raise ValueError(f"{name}={prob} is not a probability; use a number from 0 to 1")
    if len(flip_prob) != 3:
        raise ValueError(f"flip_prob={flip_prob} is not three probabilities; give those along (z, y, x)")

    def own(prob: float | None) -> float:
        return intensity_prob if prob is None else prob

    keys = ("image", "label")
    steps: list[Callable[..., Any]] = [
        RandFlipd(keys=keys, prob=prob, spatial_axis=axis) for axis, prob in enumerate(flip_prob) if prob > 0
    ]
    if isotropic_plane and turn_prob > 0:
        steps += [RandTurnPlaned(keys=keys, prob=turn_prob, plane=plane) for plane in turn_planes]
    is_in_um = bool(tilt_degrees or shear or elastic_prob)
    steps.append(
        RandWarpd(
            crop_size=crop_size,
            spacing_um=spacing_um,
            affine_prob=affine_prob,
            rotate_degrees=rotate_degrees if isotropic_plane or is_in_um else 0.0,
            tilt_degrees=tilt_degrees,
            shear=shear,
            scale_range=scale_range,
            elastic_prob=elastic_prob,
            elastic_um=elastic_um,
            elastic_period_um=elastic_period_um,
        )
    )
    steps.append(RandBlurd(prob=own(blur_prob), sigma_range=blur_sigma))
    if coarse_z_prob > 0:
        steps.append(RandCoarseZd(prob=coarse_z_prob, factor_range=coarse_z_range))
    steps += [
        RandAdjustContrastd(keys="image", prob=own(gamma_prob), gamma=(float(gamma_range[0]), float(gamma_range[1]))),
        RandScaleIntensityd(
            keys="image", prob=own(contrast_prob), factors=(intensity_scale[0] - 1, intensity_scale[1] - 1)
        ),
        RandShiftIntensityd(keys="image", prob=own(shift_prob), offsets=intensity_shift),
        RandNoised(prob=own(noise_prob), std=noise_std),
    ]
    if channel_drop_prob > 0:
        steps.append(RandChannelDropd(prob=channel_drop_prob))
    return SeededCompose(steps)
