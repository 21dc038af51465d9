"""Where to crop: draws of a volume and a region from the crop index, as a function of a random generator only.

A draw for the foreground picks a volume, then one of its instances, then a region that holds as much of that instance
as fits. Without a filter on crops the region may lie anywhere in the volume; with one it stays within half a stride of
a crop that matches.

Where crops have a voxel size of their own, a region is one of the volume resampled to it, so that it covers as many
micrometres in every volume.

Must not know: voxels, augmentation.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

import numpy as np

from seg3d_monai.data.crop_index import CropIndex
from seg3d_monai.data.crop_records import VolumeRecord
from seg3d_monai.data.resampling import MOST_RATIO, UNCHANGED, Step, covered_roi, resampled_roi, step_between
from seg3d_monai.data.volume import NEAR_SPACING

Balance = Literal["volume", "specimen", "crop", "instance"]
Roi = tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class CropDraw:
    """One drawn region.

    Args:
        volume: its volume.
        roi: (z1, y1, x1, z2, y2, x2) in the volume frame, inside the volume.
        crop_id: the crop of the grid that it came from or lies nearest to.
        step: (z, y, x) voxels of the volume per voxel of the crop.
        region: what is drawn, (z1, y1, x1, z2, y2, x2) in the volume resampled by `step`; `roi` where it is not.
    """

    volume: VolumeRecord
    roi: Roi
    crop_id: int
    step: Step
    region: Roi

    @property
    def is_resampled(self) -> bool:
        """Whether the crop's voxels have another size than the volume's."""
        return self.step != UNCHANGED

    @property
    def extent(self) -> tuple[int, int, int]:
        """(z, y, x) voxels of the whole volume when it is resampled."""
        return resampled_extent(self.volume.shape[1:], self.step)

    def crop_voxels(self, voxels: np.ndarray) -> np.ndarray:
        """How many voxels of the crop objects have that have so many in the volume: int64, at least 1."""
        return np.maximum(np.rint(voxels / prod(self.step)), 1).astype(np.int64) if self.is_resampled else voxels


class CropSampler:
    """Draws regions from an index.

    Args:
        index: the crop index.
        crop_size: extent of a region, (z, y, x) voxels of the crop; clipped where a volume is smaller.
        where: filter expression over the columns of the index.
        split: "train", "val", "test" or None for all.
        foreground_prob: probability of a draw by an instance rather than by position, 0 to 1.
        balance: what is equally likely: each volume, each specimen (then each of its volumes), each crop, or each
            instance (volumes without any are then drawn as if they held one).
        target_spacing_um: (z, y, x) micrometres per voxel of the crops; None for that of each volume.
        labelled: only volumes with labels, only those without, or, with None, both.

    Raises:
        ValueError: for arguments out of range, when no crop matches, and as `steps_to`.
    """

    def __init__(
        self,
        *,
        index: CropIndex,
        crop_size: Sequence[int],
        where: str | None = None,
        split: str | None = None,
        foreground_prob: float = 0.9,
        balance: Balance = "volume",
        target_spacing_um: Sequence[float] | None = None,
        labelled: bool | None = True,
    ) -> None:
        if not 0.0 <= foreground_prob <= 1.0:
            raise ValueError(f"foreground_prob={foreground_prob} is not a probability; use a number from 0 to 1")
        if balance not in get_args(Balance):
            raise ValueError(f"balance={balance!r} is unknown; use one of {', '.join(get_args(Balance))}")
        self.volumes, self._selection = index.select(where=where, split=split, labelled=labelled)
        if len(self._selection) == 0:
            raise ValueError(
                f"no crop of {index.path.name} matches where={where!r} and split={split!r}; "
                f"its splits are {', '.join(index.splits)}"
            )
        self._steps = steps_to(target_spacing_um, self.volumes)
        self._index = index
        self._crop_size = tuple(int(n) for n in crop_size)
        self._foreground_prob = foreground_prob
        weights = _weights(self.volumes, self._selection.num_crops, balance)
        occupied = self._selection.num_occupied > 0
        self._anywhere = np.cumsum(weights / weights.sum())
        self._occupied = np.cumsum(weights * occupied / (weights * occupied).sum()) if occupied.any() else None

    def draw(self, rng: np.random.Generator) -> CropDraw:
        """Draw one region."""
        foreground = rng.random() < self._foreground_prob and self._occupied is not None
        cumulative = self._occupied if foreground else self._anywhere
        assert cumulative is not None
        position = min(int(np.searchsorted(cumulative, rng.random(), side="right")), len(self.volumes) - 1)
        volume, step = self.volumes[position], self._steps[position]
        whole_extent = resampled_extent(volume.shape[1:], step)
        extent = np.minimum(self._crop_size, whole_extent)
        last = np.array(whole_extent) - extent
        num_crops = self._selection.num_occupied if foreground else self._selection.num_crops
        whole = self._selection.num_crops[position] == volume.num_crops

        box: np.ndarray | None = None
        crop_id = 0
        if whole:
            low, high = np.zeros(3, np.int64), last
            if foreground:
                box = self._index.instances(volume.id, ids=[int(rng.integers(volume.num_instances)) + 1]).boxes[0]
        else:
            rank = int(rng.integers(num_crops[position]))
            crop = self._index.crop(self._selection.crop(position, rank, occupied=foreground))
            crop_id = crop.id
            if foreground:
                inside = self._index.crop_instances(crop.id)
                fair = inside.ids[~inside.truncated | (inside.voxels >= self._index.min_voxels)]
                box = self._index.instances(volume.id, ids=[int(fair[int(rng.integers(len(fair)))])]).boxes[0]
            reach = (np.array(self._index.stride) // 2 // step).astype(np.int64)
            middle = (np.array(crop.roi[:3]) + np.array(crop.roi[3:])) / step
            centred = np.floor((middle - extent) / 2).astype(np.int64)
            low, high = np.clip(centred - reach, 0, last), np.clip(centred + reach, 0, last)
        if box is not None:
            low, high = _holding(np.array(resampled_roi(box.tolist(), step)), extent, low, high)
        start = rng.integers(low, high + 1)
        region: Roi = tuple(int(n) for n in (*start, *(start + extent)))  # type: ignore[assignment]
        roi = covered_roi(region, step, volume.shape[1:])
        crop_id = crop_id or self._nearest_crop(volume, roi)
        return CropDraw(volume=volume, roi=roi, crop_id=crop_id, step=step, region=region)

    def _nearest_crop(self, volume: VolumeRecord, roi: Roi) -> int:
        """The crop of the grid whose centre is nearest to the region's."""
        return volume.first_crop + self._index.grid(volume.shape[1:]).nearest(roi)


def resampled_extent(shape: Sequence[int], step: Step) -> tuple[int, int, int]:
    """(z, y, x) voxels of a volume of so many when it is resampled."""
    z, y, x = resampled_roi((0, 0, 0, *shape), step)[3:]
    return z, y, x


def steps_to(target_spacing_um: Sequence[float] | None, volumes: Sequence[VolumeRecord]) -> list[Step]:
    """The step of each volume to one voxel size, 1 along an axis that differs by at most `NEAR_SPACING`.

    Args:
        target_spacing_um: (z, y, x) micrometres per voxel; None leaves all as they are.
        volumes: of the index.

    Raises:
        ValueError: naming the volumes that do not say their voxel size, or whose differs more than fifty-fold.
    """
    if target_spacing_um is None:
        return [UNCHANGED] * len(volumes)
    target = tuple(float(value) for value in target_spacing_um)
    unknown = [volume.name for volume in volumes if volume.spacing_um is None]
    if unknown:
        raise ValueError(
            f"{_listed(unknown)}: no voxel size is known, and target_spacing_um is {list(target)}; fill the columns "
            "spacing_z_um, spacing_y_um, spacing_x_um of the manifest, or set target_spacing_um to null"
        )
    steps = [step_between(target, volume.spacing_um or target, NEAR_SPACING) for volume in volumes]
    names = zip(volumes, steps, strict=True)
    odd = [v.name for v, step in names if any(not 1 / MOST_RATIO <= ratio <= MOST_RATIO for ratio in step)]
    if odd:
        raise ValueError(
            f"{_listed(odd)}: voxels are more than {MOST_RATIO:.0f} times as long or as short as "
            f"target_spacing_um={list(target)}; give the manifest's spacings and the target in micrometres, (z, y, x)"
        )
    return steps


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _holding(box: np.ndarray, extent: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Narrow a range of starts, low to high inclusive, to those that hold a box, or lie in it where it is longer."""
    first, last = np.minimum(box[:3], box[3:] - extent), np.maximum(box[:3], box[3:] - extent)
    return np.clip(first, low, high), np.clip(last, low, high)


def _weights(volumes: Sequence[VolumeRecord], num_crops: np.ndarray, balance: Balance) -> np.ndarray:
    if balance == "crop":
        return num_crops.astype(np.float64)
    if balance == "instance":
        return np.array([max(1, volume.num_instances) for volume in volumes], np.float64)
    if balance == "specimen":
        counts = Counter(volume.specimen for volume in volumes)
        return np.array([1.0 / counts[volume.specimen] for volume in volumes])
    return np.ones(len(volumes))
