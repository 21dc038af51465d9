"""Where to crop: draws of a volume and a region from the crop index, as a function of a random generator only.

A draw for the foreground picks a volume, then one of its instances, then a region that holds as much of that instance
as fits. Without a filter on crops the region may lie anywhere in the volume; with one it stays within half a stride of
a crop that matches.

Must not know: voxels, torch, augmentation.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from seg3d_monai.data.crop_index import CropIndex
from seg3d_monai.data.crop_records import VolumeRecord

Balance = Literal["volume", "specimen", "crop", "instance"]
Roi = tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class CropDraw:
    """One drawn region.

    Args:
        volume: its volume.
        roi: (z1, y1, x1, z2, y2, x2) in the volume frame, inside the volume.
        crop_id: the crop of the grid that it came from or lies nearest to.
    """

    volume: VolumeRecord
    roi: Roi
    crop_id: int


class CropSampler:
    """Draws regions from an index.

    Args:
        index: the crop index.
        crop_size: extent of a region, (z, y, x) voxels; clipped where a volume is smaller.
        where: filter expression over the columns of the index.
        split: "train", "val", "test" or None for all.
        foreground_prob: probability of a draw by an instance rather than by position, 0 to 1.
        balance: what is equally likely: each volume, each specimen (then each of its volumes), each crop, or each
            instance (volumes without any are then drawn as if they held one).

    Raises:
        ValueError: for arguments out of range, and when no crop matches.
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
    ) -> None:
        if not 0.0 <= foreground_prob <= 1.0:
            raise ValueError(f"foreground_prob={foreground_prob} is not a probability; use a number from 0 to 1")
        if balance not in get_args(Balance):
            raise ValueError(f"balance={balance!r} is unknown; use one of {', '.join(get_args(Balance))}")
        self.volumes, self._selection = index.select(where=where, split=split)
        if len(self._selection) == 0:
            raise ValueError(
                f"no crop of {index.path.name} matches where={where!r} and split={split!r}; "
                f"its splits are {', '.join(index.splits)}"
            )
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
        volume = self.volumes[position]
        extent = np.minimum(self._crop_size, volume.shape[1:])
        last = np.array(volume.shape[1:]) - extent
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
            reach = np.array(self._index.stride) // 2
            centred = (np.array(crop.roi[:3]) + np.array(crop.roi[3:]) - extent) // 2
            low, high = np.clip(centred - reach, 0, last), np.clip(centred + reach, 0, last)
        if box is not None:
            low, high = _holding(box, extent, low, high)
        start = rng.integers(low, high + 1)
        roi: Roi = tuple(int(n) for n in (*start, *(start + extent)))  # type: ignore[assignment]
        return CropDraw(volume=volume, roi=roi, crop_id=crop_id or self._nearest_crop(volume, roi))

    def _nearest_crop(self, volume: VolumeRecord, roi: Roi) -> int:
        """The crop of the grid whose centre is nearest to the region's."""
        return volume.first_crop + self._index.grid(volume.shape[1:]).nearest(roi)


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
