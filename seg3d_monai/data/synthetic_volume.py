"""A synthetic light-sheet volume in memory, with labels; the same arguments give the same bits.

`synthetic_nuclei` says where the nuclei are and `synthetic_imaging` what the camera sees of them; here the two meet.

It must not know files, training or metrics.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from seg3d_monai.data.synthetic_imaging import ImagingModel, chromatin_texture, expose
from seg3d_monai.data.synthetic_nuclei import NucleiModel, Nucleus, paint_nuclei, place_nuclei

Array = np.ndarray


def make_volume(
    shape: Sequence[int],
    *,
    seed: int | Sequence[int],
    spacing_um: Sequence[float] = (2.0, 0.8, 0.8),
    depth_um: float = 0.0,
    channels: int = 1,
    num_classes: int = 1,
    nuclei: NucleiModel | None = None,
    imaging: ImagingModel | None = None,
) -> tuple[Array, Array]:
    """Make one volume and its labels; the same arguments give the same bits.

    Args:
        shape: voxels (z, y, x), each at least 1.
        seed: integer(s) >= 0 from which every draw follows.
        spacing_um: voxel size (z, y, x).
        depth_um: depth of the first slice in the specimen, >= 0; deeper is dimmer and more blurred.
        channels: 1 (nuclei) or 2 (nuclei, and a stain of their rims).
        num_classes: 1, or 2: class 0 large and dim, class 1 small and bright (`make_volume_with_classes` returns them).
        nuclei: how nuclei look; None is the default model.
        imaging: the microscope; None is the default model.

    Returns:
        image uint16 [Z, Y, X] (or [2, Z, Y, X]) and labels uint32 [Z, Y, X], 0 background, ids compact from 1.

    Raises:
        ValueError: an argument is out of its range.
    """
    image, labels, _ = make_volume_with_classes(
        shape,
        seed=seed,
        spacing_um=spacing_um,
        depth_um=depth_um,
        channels=channels,
        num_classes=num_classes,
        nuclei=nuclei,
        imaging=imaging,
    )
    return image, labels


def make_volume_with_classes(
    shape: Sequence[int],
    *,
    seed: int | Sequence[int],
    spacing_um: Sequence[float] = (2.0, 0.8, 0.8),
    depth_um: float = 0.0,
    channels: int = 1,
    num_classes: int = 2,
    nuclei: NucleiModel | None = None,
    imaging: ImagingModel | None = None,
) -> tuple[Array, Array, Array]:
    """As `make_volume`, with the class of each instance.

    Returns:
        image, labels, and classes int64 [G]: classes[id - 1] is the class of instance id.

    Raises:
        ValueError: an argument is out of its range.
    """
    size = checked_shape("shape", shape)
    spacing = checked_spacing(spacing_um)
    check_kinds(channels, num_classes, depth_um)
    nuclei, imaging = nuclei or NucleiModel(), imaging or ImagingModel()
    rng = np.random.default_rng(seed)
    placed = place_nuclei(rng, np.array(size) * spacing, nuclei, num_classes)
    labels, nearest, runner_up, kept = paint_nuclei(placed, size, spacing)
    classes = np.array([nucleus.kind for nucleus in kept], dtype=np.int64)
    texture = chromatin_texture(rng, size, spacing, nuclei.texture)
    stains = stain(labels, nearest, runner_up, brightness_of(kept), texture, channels)
    images = [expose(rng, each, spacing, depth_um, imaging) for each in stains]
    return (images[0] if channels == 1 else np.stack(images)), labels, classes


def brightness_of(kept: Sequence[Nucleus]) -> Array:
    """Brightness by label id, 0 for the background; float32 [G + 1]."""
    return np.array([0.0] + [nucleus.brightness for nucleus in kept], dtype=np.float32)


def stain(
    labels: Array, nearest: Array, runner_up: Array, brightness: Array, texture: Array, channels: int
) -> list[Array]:
    """Fluorescence of each channel, 1 for an average nucleus: the nuclei, and their rims.

    Args:
        labels: [d, h, w], ids compact from 1.
        nearest: relative distance (1 on a surface) to the nearest nucleus.
        runner_up: that to the second nearest.
        brightness: from `brightness_of`.
        texture: of the chromatin, 1 on average.
        channels: 1 or 2.
    """
    # Dimmer towards the rim, and dark where two nuclei meet: there is a membrane and some cytoplasm between them.
    body = 1.0 - 0.35 * np.minimum(nearest, 1.0) ** 2
    seam = np.clip((runner_up - nearest) / 0.22, 0.35, 1.0)
    stains = [brightness[labels] * body * seam * texture]
    if channels == 2:
        rim = np.exp(-(((np.minimum(nearest, 2.0) - 1.0) / 0.1) ** 2)).astype(np.float32)
        stains.append(0.8 * rim)
    return stains


def check_kinds(channels: int, num_classes: int, depth_um: float = 0.0) -> None:
    """See that there are one or two channels and classes, and that the depth is not negative.

    Raises:
        ValueError: naming the argument.
    """
    if channels not in (1, 2):
        raise ValueError(f"channels must be 1 or 2, got {channels}")
    if num_classes not in (1, 2):
        raise ValueError(f"num_classes must be 1 or 2, got {num_classes}")
    if not depth_um >= 0:
        raise ValueError(f"depth_um must be >= 0, got {depth_um}")


def checked_shape(name: str, shape: Sequence[int]) -> tuple[int, int, int]:
    """Three positive integers (z, y, x)."""
    if len(shape) != 3 or any(int(size) != size or size < 1 for size in shape):
        raise ValueError(f"{name} must be three positive integers (z, y, x), got {tuple(shape)}")
    return int(shape[0]), int(shape[1]), int(shape[2])


def checked_spacing(spacing_um: Sequence[float]) -> Array:
    """Three positive numbers (z, y, x), float64 [3]."""
    spacing = np.asarray(spacing_um, dtype=np.float64)
    if spacing.shape != (3,) or not np.all(np.isfinite(spacing)) or not np.all(spacing > 0):
        raise ValueError(f"spacing_um must be three positive numbers (z, y, x), got {tuple(spacing_um)}")
    return spacing
