"""Geometry of image and label together, as MONAI dictionary transforms: turns, and one resampling for all the rest.

Labels are ids, not intensities: they arrive compact (so that float32, through which they are sampled, holds them
exactly), are sampled by nearest neighbour, and are shifted by one meanwhile so that what comes in from outside is
ignore (-1) rather than background.

A sample may bring "spacing_um", its micrometres per voxel along (z, y, x). Planes of unequal voxel sizes are then not
turned, and `RandWarpd` turns, shears and bends in micrometres.

Must not know: files, the crop index, targets.
"""

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from math import ceil
from typing import Any

import numpy as np
import torch
from monai.transforms import MapTransform, Randomizable, RandRotate90d
from torch.nn import functional

from seg3d_monai.data.targets import IGNORE
from seg3d_monai.data.volume import NEAR_SPACING, check_spacing

PLANES = ("zy", "zx", "yx")
_EXACT_IDS = 1 << 24  # float32 holds every integer up to here
_MOST_BENDING = 0.4
"""Amplitude over period below which a cubic B-spline deformation cannot fold (Choi and Lee 2000: 1 / 2.48 in 3D)."""
_MOST_SHEAR = 0.4
Sample = Mapping[Hashable, torch.Tensor]


class RandTurnPlaned(RandRotate90d):
    """Turn by 90, 180 or 270 degrees within a plane; crops that are not square there are left as they are.

    Args:
        keys: what is turned, all alike.
        prob: probability of a turn.
        plane: "yx", or "zy" or "zx" for voxels that are as long in z. A plane whose voxel sizes, where the sample
            brings them, differ by more than `NEAR_SPACING` is left as it is.

    Raises:
        ValueError: for another plane.
    """

    def __init__(self, *, keys: Sequence[str] = ("image", "label"), prob: float = 0.75, plane: str = "yx") -> None:
        if plane not in PLANES:
            raise ValueError(f"plane={plane!r} is none of {', '.join(PLANES)}; name the axes of one")
        self.plane = plane
        self._axes = ("zyx".index(plane[0]), "zyx".index(plane[1]))
        super().__init__(keys=keys, prob=prob, max_k=3, spatial_axes=self._axes)

    def __call__(self, data: Sample, lazy: bool | None = None) -> Any:
        """Transform one sample."""
        first, second = self._axes
        is_square = all(data[key].shape[first + 1] == data[key].shape[second + 1] for key in self.keys)
        spacing = _spacing(data, (1.0, 1.0, 1.0))
        if not is_square or abs(spacing[first] / spacing[second] - 1) > NEAR_SPACING:
            return dict(data)
        return super().__call__(data, lazy=lazy)


class RandWarpd(Randomizable, MapTransform):
    """Rotate, tilt, shear, zoom and bend, in micrometres, then crop at the centre; everything is sampled once.

    The bending is a cubic B-spline of random displacements on a lattice, small enough that it cannot fold: cells keep
    their neighbours and stay in one piece. Positions are bent first, then mapped affinely.

    Args:
        crop_size: (z, y, x) voxels that are kept, None for all; only these are computed.
        spacing_um: micrometres per voxel (z, y, x) of samples that do not bring theirs; None takes cubes of 1.
        affine_prob: probability of the rotation, tilts, shears and zooms together, 0 to 1.
        rotate_degrees: largest angle about z, either way.
        tilt_degrees: largest angles about y and about x.
        shear: largest shift of one axis per unit of another, 0 to 0.4.
        scale_range: smallest and largest magnification of an object along (z, y, x).
        elastic_prob: probability of the bending, 0 to 1.
        elastic_um: smallest and largest amplitude; a displacement of the lattice is at most so long along each axis.
        elastic_period_um: distance of the lattice's points; the amplitude is at most 0.4 of it.
        image_key: float [C, D, H, W], sampled trilinearly; 0 comes in from outside.
        label_key: integer [1, D, H, W] with -1 for ignore; nearest neighbour; -1 comes in from outside.

    Raises:
        ValueError: for numbers out of range, or labels that float32 does not hold exactly.
    """

    def __init__(
        self,
        *,
        crop_size: Sequence[int] | None = None,
        spacing_um: Sequence[float] | None = None,
        affine_prob: float = 0.5,
        rotate_degrees: float = 30.0,
        tilt_degrees: float = 10.0,
        shear: float = 0.1,
        scale_range: Sequence[Sequence[float]] = ((0.8, 1.25), (0.8, 1.25), (0.8, 1.25)),
        elastic_prob: float = 0.3,
        elastic_um: Sequence[float] = (0.0, 3.0),
        elastic_period_um: float = 12.0,
        image_key: str = "image",
        label_key: str = "label",
    ) -> None:
        MapTransform.__init__(self, (image_key, label_key))
        _check_scales(scale_range)
        if not 0 <= shear <= _MOST_SHEAR:
            raise ValueError(f"shear={shear} is outside 0 … {_MOST_SHEAR}; more would turn crops inside out")
        if len(elastic_um) != 2 or not 0 <= elastic_um[0] <= elastic_um[1]:
            raise ValueError(f"elastic_um={elastic_um} is not two amplitudes 0 <= low <= high in micrometres")
        if not (elastic_period_um > 0 and elastic_um[1] <= _MOST_BENDING * elastic_period_um):
            raise ValueError(
                f"elastic_um={elastic_um} reaches more than {_MOST_BENDING} of elastic_period_um={elastic_period_um}, "
                "which can fold space over; lower the one or raise the other"
            )
        self.crop_size = None if crop_size is None else tuple(int(n) for n in crop_size)
        self.spacing_um = (1.0, 1.0, 1.0) if spacing_um is None else check_spacing(spacing_um)
        self.affine_prob, self.elastic_prob = float(affine_prob), float(elastic_prob)
        self._angles = np.deg2rad([rotate_degrees, tilt_degrees, tilt_degrees])
        self._shear = float(shear)
        self._scales = np.array(scale_range, np.float64)
        self._elastic_um = (float(elastic_um[0]), float(elastic_um[1]))
        self._period_um = float(elastic_period_um)
        self._image_key, self._label_key = image_key, label_key

    def __call__(self, data: Sample) -> dict[Hashable, torch.Tensor]:
        """Transform one sample."""
        result = dict(data)
        is_affine, is_elastic = self.R.rand() < self.affine_prob, self.R.rand() < self.elastic_prob
        if not (is_affine or is_elastic):
            for key in (self._image_key, self._label_key):
                result[key] = _centre(result[key], self.crop_size)
            return result
        image, label = _plain(result[self._image_key]), _plain(result[self._label_key])
        source = np.array(image.shape[1:])
        size = source if self.crop_size is None else np.array(self.crop_size)
        spacing = np.array(_spacing(data, self.spacing_um))
        to_input = np.linalg.inv(self._draw_matrix()) if is_affine else np.eye(3)
        bending = self._draw_bending(size * spacing, size) if is_elastic else None
        if bending is None and not (to_input[0, 1:].any() or to_input[1:, 0].any()):
            depth, height, width = axis_shares(to_input, source=source, size=size, spacing=spacing)
            sampled = partial(_sample_planes, depth=depth[:, 2], grid=height[:, None, :2] + width[:, :2])
        else:
            sampled = partial(_sample, grid=sampling_grid(to_input, bending, source=source, size=size, spacing=spacing))
        result[self._image_key] = sampled(image.to(torch.float32), mode="bilinear")
        result[self._label_key] = sampled(_as_float(label), mode="nearest").to(label.dtype) + IGNORE
        return result

    def _draw_matrix(self) -> np.ndarray:
        """What is done to an object around the centre, [3, 3] on (z, y, x) micrometres."""
        zoom = np.diag(self.R.uniform(self._scales[:, 0], self._scales[:, 1]))
        shear = np.eye(3)
        shear[~np.eye(3, dtype=bool)] = self.R.uniform(-self._shear, self._shear, 6)
        matrix = shear @ zoom
        for plane, angle in zip(("yx", "zx", "zy"), self.R.uniform(-self._angles, self._angles), strict=True):
            matrix = rotation(plane, angle) @ matrix
        return matrix

    def _draw_bending(self, extent_um: np.ndarray, size: np.ndarray) -> torch.Tensor:
        """Displacement of every voxel, float32 [3, D, H, W], micrometres along (z, y, x)."""
        amplitude = self.R.uniform(*self._elastic_um)
        points = [ceil(extent / self._period_um) + 3 for extent in extent_um]
        lattice = self.R.uniform(-amplitude, amplitude, (3, *points))
        return bend(torch.from_numpy(lattice).to(torch.float32), (extent_um / self._period_um).tolist(), size.tolist())


def rotation(plane: str, angle: float) -> np.ndarray:
    """Rotation within a plane, [3, 3] on (z, y, x): from the plane's first axis towards its second, radians."""
    first, second = ("zyx".index(axis) for axis in plane)
    matrix = np.eye(3)
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[second, first] = np.sin(angle)
    matrix[first, second] = -np.sin(angle)
    return matrix


def bend(lattice: torch.Tensor, num_periods: Sequence[float], size: Sequence[int]) -> torch.Tensor:
    """Interpolate displacements by cubic B-splines.

    Args:
        lattice: [K, a, b, c], values on the lattice; the volume's first face lies at point 1 of each axis.
        num_periods: extent of the volume in distances of the lattice's points, along (z, y, x).
        size: (D, H, W) voxels of the volume.

    Returns:
        [K, D, H, W], at the voxels' centres.
    """
    for periods, voxels, points in zip(num_periods, size, lattice.shape[1:], strict=True):
        place = (torch.arange(voxels, dtype=torch.float64) + 0.5) * (periods / voxels) + 1
        away = (place[:, None] - torch.arange(points)).abs()
        weights = torch.where(away < 1, 2 / 3 - away**2 + away**3 / 2, (2 - away).clamp(min=0) ** 3 / 6)
        lattice = torch.tensordot(lattice, weights.to(lattice.dtype), dims=([1], [1]))  # the new axis comes last
    return lattice


def sampling_grid(
    to_input: np.ndarray,
    bending: torch.Tensor | None,
    *,
    source: Sequence[int] | np.ndarray,
    size: Sequence[int] | np.ndarray,
    spacing: Sequence[float] | np.ndarray,
) -> torch.Tensor:
    """Where each voxel of the output lies in the input, for `grid_sample` without aligned corners.

    Args:
        to_input: [3, 3], from (z, y, x) micrometres around the output's centre to such around the input's.
        bending: [3, D, H, W] micrometres that are added to a place in the output before; None for none.
        source: (D, H, W) of the input.
        size: (D, H, W) of the output.
        spacing: micrometres per voxel (z, y, x) of both.

    Returns:
        float32 [1, D, H, W, 3], (x, y, z) from -1 to 1 across the input.
    """
    depth, height, width = axis_shares(to_input, source=source, size=size, spacing=spacing)
    grid = (depth[:, None] + height)[:, :, None] + width  # in less than half the time of affine_grid
    if bending is not None:
        grid += (_from_um(to_input, source, spacing) @ bending.flatten(1)).T.reshape(grid.shape)
    return grid[None]


def axis_shares(
    to_input: np.ndarray,
    *,
    source: Sequence[int] | np.ndarray,
    size: Sequence[int] | np.ndarray,
    spacing: Sequence[float] | np.ndarray,
) -> list[torch.Tensor]:
    """What each axis adds to the places of `sampling_grid` without bending, whose arguments these are.

    Returns:
        For z, y and x float32 [voxels along it, 3], (x, y, z).
    """
    along = _from_um(to_input, source, spacing) * torch.from_numpy(np.array(size) * spacing / 2).to(torch.float32)
    return [
        (2 * torch.arange(int(n), dtype=torch.float32) + 1)[:, None] / int(n) * column - column
        for n, column in zip(size, along.T, strict=True)
    ]


def _from_um(to_input: np.ndarray, source: Sequence[int] | np.ndarray, spacing: Any) -> torch.Tensor:
    """[3, 3], from (z, y, x) micrometres around the output's centre to (x, y, z) from -1 to 1 across the input."""
    half = np.array(source) * spacing / 2
    return torch.from_numpy(np.ascontiguousarray((to_input / half[:, None])[::-1])).to(torch.float32)


def _sample(tensor: torch.Tensor, *, grid: torch.Tensor, mode: str) -> torch.Tensor:
    return functional.grid_sample(tensor[None], grid, mode=mode, padding_mode="zeros", align_corners=False)[0]


def _sample_planes(tensor: torch.Tensor, *, depth: torch.Tensor, grid: torch.Tensor, mode: str) -> torch.Tensor:
    """What `_sample` gives where planes stay planes, in a fraction of the time: torch vectorises it in 2D alone.

    Args:
        tensor: float32 [C, d, h, w].
        depth: [D], places of the output's planes, -1 to 1 across the input.
        grid: [H, W, 2], (x, y) of a plane's voxels, -1 to 1.
        mode: "bilinear" or "nearest".

    Returns:
        float32 [C, D, H, W].
    """
    grids, num_planes = grid.expand(len(tensor), *grid.shape), tensor.shape[1]
    planes = functional.grid_sample(tensor, grids, mode=mode, padding_mode="zeros", align_corners=False)
    place = ((depth + 1) * num_planes - 1) / 2
    if mode == "nearest":
        return _planes_at(planes, place.round(), torch.ones_like(place))
    below = place.floor()
    return _planes_at(planes, below, below + 1 - place) + _planes_at(planes, below + 1, place - below)


def _planes_at(planes: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Planes [C, D, H, W] by their numbers, weighted; those outside are 0."""
    inside = index.clamp(0, planes.shape[1] - 1)
    return planes[:, inside.long()] * torch.where(inside == index, weight, 0)[:, None, None]


def _check_scales(scale_range: Sequence[Sequence[float]]) -> None:
    if len(scale_range) != 3 or any(not 0 < low <= high for low, high in scale_range):
        raise ValueError(
            f"scale_range={scale_range} is not three pairs 0 < low <= high; give magnifications along (z, y, x)"
        )


def _as_float(label: torch.Tensor) -> torch.Tensor:
    """Labels as float32, 0 for ignore."""
    if label.numel() and int(label.max()) >= _EXACT_IDS:
        raise ValueError(
            f"labels reach {int(label.max())} and float32 holds ids below {_EXACT_IDS}; renumber them from 1"
        )
    return (label - IGNORE).to(torch.float32)


def _spacing(data: Sample, otherwise: tuple[float, float, float]) -> tuple[float, float, float]:
    """Micrometres per voxel (z, y, x) that a sample brings."""
    known = data.get("spacing_um")
    if known is None:
        return otherwise
    z, y, x = (float(value) for value in known)
    return z, y, x


def _centre(tensor: torch.Tensor, size: Sequence[int] | None) -> torch.Tensor:
    for axis, wanted in enumerate(size or (), start=1):
        surplus = tensor.shape[axis] - wanted
        if surplus > 0:
            tensor = tensor.narrow(axis, surplus // 2, wanted)
    return tensor


def _plain(tensor: Any) -> torch.Tensor:
    """A plain tensor: MONAI's carries metadata that costs time in every later operation."""
    return tensor.as_tensor() if hasattr(tensor, "as_tensor") else torch.as_tensor(tensor)
