"""Datasets over the crop index: augmented training crops with targets, and whole volumes for validation.

An item of `CropDataset` is a function of (seed, epoch, position) and of the files, never of a worker's running state:
a draw from the index, the region's voxels, the transform with its own seed, then targets derived from what the
transform left. What nobody annotated, what the volume's edge or the crop cut to slivers and what is too small to be an
object is ignore, not background: a network is not punished for what it may have seen rightly.

Must not know: SQL, models, losses.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import Any, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from seg3d_monai.data.crop_index import CropIndex
from seg3d_monai.data.crop_records import VolumeRecord
from seg3d_monai.data.crop_sampling import Balance, CropDraw, CropSampler, Roi, steps_to
from seg3d_monai.data.intensity import Intensity
from seg3d_monai.data.resampling import resample_image, resample_labels, source_roi
from seg3d_monai.data.targets import IGNORE, Targets, compact_labels, derive_targets
from seg3d_monai.data.volume import NEAR_SPACING, Spacing, Volume, check_spacing
from seg3d_monai.data.volume_cache import VolumeCache

_log = logging.getLogger(__name__)

CACHE_BYTES, WORKER_CACHE_BYTES = 1 << 30, 1 << 27
Transform = Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]


class CropSample(TypedDict):
    """One training crop.

    image: float32 [C, D, H, W], normalised; resampled where the dataset's `target_spacing_um` says so, like targets.
    targets: see `Targets`; ids are the compact ids of the volume in the index.
    crop_id: the crop of the grid that the region came from or lies nearest to.
    volume: name of the volume.
    roi: (z1, y1, x1, z2, y2, x2) of the crop before augmentation, volume frame, inside the volume.
    """

    image: torch.Tensor
    targets: Targets
    crop_id: int
    volume: str
    roi: Roi


def check_crops(*, crop_size: Sequence[int], num_samples: int, seed: int, min_visible: float) -> None:
    """See that crops can be drawn so.

    Raises:
        ValueError: they cannot; the message names what and says what to give.
    """
    if len(crop_size) != 3 or min(crop_size) < 1:
        raise ValueError(f"crop_size={crop_size} is not three positive voxel counts; give (z, y, x)")
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} leaves nothing to draw; use 1 or more")
    if seed < 0:
        raise ValueError(f"seed={seed} is negative; use 0 or more")
    if not 0.0 <= min_visible <= 1.0:
        raise ValueError(f"min_visible={min_visible} is not a fraction; use a number from 0 to 1")


def epoch_and_position(item: int | tuple[int, int], num_samples: int) -> tuple[int, int]:
    """What an item of a dataset of crops asks for; a position alone is one of epoch 0.

    Raises:
        IndexError: the position is not below `num_samples`.
    """
    epoch, position = item if isinstance(item, tuple) else (0, item)
    if not 0 <= position < num_samples:
        raise IndexError(f"position {position} is outside 0 … {num_samples - 1}")
    return int(epoch), int(position)


class CropDataset(Dataset[CropSample]):
    """Random crops of indexed volumes, with targets.

    Args:
        index: the crop index.
        num_samples: items per epoch.
        crop_size: extent of the crops, (z, y, x) voxels of the crop; the index's by default.
        where: filter expression over the columns of the index, such as ``quality_image >= 2``.
        split: "train", "val", "test" or None for all.
        transform: callable on {"image": float32 [C, D, H, W], "label": int32 [1, D, H, W]}, and "spacing_um", float64
            [3], where it is known, such as `train_transforms()`; labels are 0 background, -1 ignore, else compact ids
            from 1, which it must keep. One with `set_random_state` is seeded per sample.
        seed: of every draw.
        foreground_prob: probability of a draw by an instance rather than by position, 0 to 1.
        balance: what is equally likely: each "volume", "specimen", "crop" or "instance"; see `CropSampler`.
        target_spacing_um: (z, y, x) micrometres per voxel of all crops. Of a volume whose voxel size differs by more
            than `NEAR_SPACING` along an axis, a region of as many micrometres is read and resampled there as a
            prediction would (`resampling`), labels to the nearest voxel; others are read as they are. The transform
            then gets this voxel size, and all counts of voxels are of the crop. None takes every volume as it is.
        margin: voxels read beyond the region on every side, (z, y, x), so that rotations bring in neighbours rather
            than padding; the transform sees crop_size + 2 * margin, and what it returns is cropped at the centre.
        min_voxels: visible voxels below which a cut instance becomes ignore; the index's by default.
        min_visible: visible fraction below which a cut instance becomes ignore, 0 to 1.
        min_object_voxels: whole voxels below which an instance becomes ignore, such as debris; the index's by default.
        images_only: whether volumes without labels are drawn from, too, and labels of the others are not read: for
            pre-training. All voxels are then ignore, no crop has an instance, and all draws are by position.
        cache_bytes: bytes of decoded chunks that a process keeps; None keeps 1 GiB. A loader's worker then keeps 128
            MiB, or its share of 1 GiB if all volumes fit into that (at 2 bytes a voxel).
        in_channels: channels that the network takes, to be compared with the volumes'; None takes any.
        num_classes: foreground classes that the network knows, likewise.

    Raises:
        ValueError: for arguments out of range, an unknown column, when no crop matches, for volumes with other
            channels or more classes than the network, and, naming them, for volumes without a voxel size where a
            target is set.
    """

    def __init__(
        self,
        index: CropIndex,
        *,
        num_samples: int,
        crop_size: Sequence[int] | None = None,
        where: str | None = None,
        split: str | None = None,
        transform: Transform | None = None,
        seed: int = 0,
        foreground_prob: float = 0.9,
        balance: Balance = "volume",
        target_spacing_um: Sequence[float] | None = None,
        margin: Sequence[int] = (0, 0, 0),
        min_voxels: int | None = None,
        min_visible: float = 0.1,
        min_object_voxels: int | None = None,
        images_only: bool = False,
        cache_bytes: int | None = None,
        in_channels: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        size = tuple(int(n) for n in (index.crop_size if crop_size is None else crop_size))
        check_crops(crop_size=size, num_samples=num_samples, seed=seed, min_visible=min_visible)
        if len(margin) != 3 or min(margin) < 0:
            raise ValueError(f"margin={margin} is not three voxel counts from 0; give (z, y, x)")
        self.index = index
        self.num_samples = int(num_samples)
        self.crop_size = size
        self.seed = int(seed)
        self.transform = transform
        self.target_spacing_um = _target(target_spacing_um)
        self._margin = tuple(int(n) for n in margin)
        self._min_voxels = index.min_voxels if min_voxels is None else int(min_voxels)
        self._min_visible = float(min_visible)
        self._min_object_voxels = index.min_object_voxels if min_object_voxels is None else int(min_object_voxels)
        self._sampler = CropSampler(
            index=index,
            crop_size=size,
            where=where,
            split=split,
            foreground_prob=0.0 if images_only else foreground_prob,
            balance=balance,
            target_spacing_um=self.target_spacing_um,
            labelled=None if images_only else True,
        )
        self._images_only = bool(images_only)
        if cache_bytes is not None and cache_bytes < 0:
            raise ValueError(f"cache_bytes={cache_bytes} is negative; use 0 for no cache")
        self._cache_bytes = None if cache_bytes is None else int(cache_bytes)
        self._cache: VolumeCache | None = None
        self._cache_owner = 0
        channels = sorted({volume.shape[0] for volume in self._sampler.volumes})
        if len(channels) > 1:
            raise ValueError(f"the volumes have {channels} channels; select equal ones, such as where='channels == 1'")
        self.num_channels = channels[0]
        if in_channels not in (None, self.num_channels):
            raise ValueError(f"in_channels={in_channels!r}, and the volumes have {self.num_channels}; give that many")
        if num_classes is not None and not images_only:
            self._check_classes(num_classes)

    def _check_classes(self, num_classes: int) -> None:
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes={num_classes!r} is no number of classes; give an integer >= 1")
        if self.index.num_classes <= num_classes:
            return
        for volume in self._sampler.volumes:  # those that are left out may have more
            last = int(self.index.instances(volume.id).classes.max(initial=0))
            if last >= num_classes:
                raise ValueError(
                    f"num_classes={num_classes}, and {volume.name} has objects of class {last}; classes count from 0, "
                    f"so give {last + 1} or more"
                )

    @cached_property
    def spacing_um(self) -> Spacing | None:
        """(z, y, x) micrometres per voxel that crops have in common: the target, else the median of what is known.

        None where there is no target and no voxel size is known, or one differs from the median by more than
        `NEAR_SPACING`: then crops show cells of several sizes, in voxels.
        """
        if self.target_spacing_um is not None:
            return self.target_spacing_um
        known = np.array([volume.spacing_um for volume in self._sampler.volumes if volume.spacing_um is not None])
        if not len(known):
            return None
        z, y, x = np.median(known, axis=0).tolist()
        if (np.abs(known / (z, y, x) - 1) > NEAR_SPACING).any():
            sizes = [list(size) for size in dict.fromkeys(map(tuple, known.tolist()))]
            _log.info("the volumes have no voxel size in common: %s micrometre (z, y, x)", sizes)
            return None
        return z, y, x

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, item: int | tuple[int, int]) -> CropSample:
        """Make one crop.

        Args:
            item: (epoch, position), or a position of epoch 0.

        Raises:
            IndexError: if the position is not below `num_samples`.
        """
        epoch, position = epoch_and_position(item, self.num_samples)
        rng = np.random.default_rng([self.seed, epoch, position])
        draw = self._sampler.draw(rng)
        transform_seed = int(rng.integers(2**32))
        image, label = self._read(draw)
        spacing = self.target_spacing_um if draw.is_resampled else draw.volume.spacing_um
        codes, labels = compact_labels(label, ignore=int(np.iinfo(label.dtype).max))
        record = self.index.instances(draw.volume.id, labels=labels.tolist())
        if len(record) != len(labels):
            raise ValueError(f"{draw.volume.label} holds ids that the index does not know; build the index again")

        data = {
            "image": torch.from_numpy(self._pad(draw, draw.volume.intensity.normalise(image), 0)),
            "label": torch.from_numpy(self._pad(draw, codes, IGNORE)),
        }
        if spacing is not None:
            data["spacing_um"] = torch.tensor(spacing, dtype=torch.float64)
        if self.transform is not None:
            if hasattr(self.transform, "set_random_state"):
                self.transform.set_random_state(seed=transform_seed)
            data = dict(self.transform(data))
        image_crop = _fit(_plain(data["image"]).to(torch.float32), self.crop_size, 0.0)
        code_crop = _fit(_plain(data["label"]), self.crop_size, IGNORE)[0].numpy()

        # ids of the transformed crop are ranks within the crop; the volume's own come back with the targets.
        targets = derive_targets(
            code_crop,
            ids=record.ids,
            classes=dict(zip(record.ids.tolist(), record.classes.tolist(), strict=True)),
            full_voxels=dict(zip(record.ids.tolist(), draw.crop_voxels(record.voxels).tolist(), strict=True)),
            min_voxels=self._min_voxels,
            min_visible=self._min_visible,
            min_object_voxels=self._min_object_voxels,
        )
        return CropSample(
            image=image_crop, targets=targets, crop_id=draw.crop_id, volume=draw.volume.name, roi=draw.roi
        )

    def _read(self, draw: CropDraw) -> tuple[np.ndarray, np.ndarray]:
        """Raw image [C, d, h, w] and labels [1, d, h, w] of the region and as much of its margin as the volume has."""
        volume, region = draw.volume, self._region(draw)[1].tolist()
        roi = source_roi(region, draw.step, volume.shape[1:])
        cache = self._own_cache()
        image = cache.read(("image", volume.id), lambda: self.index.open_image(volume), roi)
        label = self._read_label(volume, roi, image.shape[1:])
        if draw.is_resampled:
            # As in a prediction, before the intensity is normalised, which clips.
            is_narrow = image.dtype.itemsize <= 2 or image.dtype == np.float32
            block = torch.from_numpy(image.astype(np.float32 if is_narrow else np.float64))
            image = resample_image(block, roi, region, draw.step).numpy()
            label = resample_labels(label, roi, region, draw.step)
        return image, label

    def _read_label(self, volume: VolumeRecord, roi: Roi, extent: Sequence[int]) -> np.ndarray:
        if self._images_only:
            return np.full((1, *extent), np.iinfo(np.uint16).max, np.uint16)
        cache = self._own_cache()
        label = cache.read(("label", volume.id), lambda: self.index.open_label(volume), roi)
        if volume.ignore is not None:
            mask = cache.read(("ignore", volume.id), lambda: self._open_ignore(volume), roi)
            label[mask != 0] = np.iinfo(label.dtype).max
        return label

    def _open_ignore(self, volume: VolumeRecord) -> Volume:
        mask = self.index.open_ignore(volume)
        assert mask is not None
        return mask

    def _own_cache(self) -> VolumeCache:
        """This process's cache; one that came with a fork belongs to the parent."""
        if self._cache is None or self._cache_owner != os.getpid():
            max_bytes = self._default_cache_bytes() if self._cache_bytes is None else self._cache_bytes
            self._cache = VolumeCache(max_bytes=max_bytes)
            self._cache_owner = os.getpid()
        return self._cache

    def _default_cache_bytes(self) -> int:
        worker = get_worker_info()
        if worker is None:
            return CACHE_BYTES
        share = CACHE_BYTES // worker.num_workers
        all_bytes = sum((record.shape[0] + 1) * prod(record.shape[1:]) * 2 for record in self._sampler.volumes)
        return share if all_bytes <= share else WORKER_CACHE_BYTES

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}  # voxels do not travel to workers

    def _region(self, draw: CropDraw) -> tuple[np.ndarray, np.ndarray]:
        """The region with its margin at full size, which may leave the volume, and the part of it inside.

        In voxels of the crop, as `CropDraw.region`.
        """
        margin, size = np.array(self._margin), np.array(self.crop_size)
        start = np.array(draw.region[:3]) - margin
        stop = start + size + 2 * margin
        extent = np.array(draw.extent)
        inside = np.concatenate([np.clip(start, 0, extent), np.clip(stop, 0, extent)])
        return np.concatenate([start, stop]), inside

    def _pad(self, draw: CropDraw, array: np.ndarray, value: int) -> np.ndarray:
        full, inside = self._region(draw)
        widths = [(int(inside[a] - full[a]), int(full[a + 3] - inside[a + 3])) for a in range(3)]
        if not any(before or after for before, after in widths):
            return np.ascontiguousarray(array)
        return np.pad(array, [(0, 0), *widths], constant_values=value)


class VolumeItem(TypedDict):
    """One volume for validation.

    volume: the image, raw voxels.
    label: the label volume as on disk; the dtype's maximum is ignore.
    name: the volume's name.
    classes: class of each id on disk.
    intensity: its normalisation.
    split: "train", "val", "test" or None.
    """

    volume: Volume
    label: Volume
    name: str
    classes: dict[int, int]
    intensity: Intensity
    split: str | None


class VolumeDataset(Dataset[VolumeItem]):
    """Whole volumes of an index, opened lazily, in the order of the manifest.

    Args:
        index: the crop index.
        split: "train", "val", "test", None for all, or several, of which the first that has a matching volume is taken:
            ``("test", "val")`` is the test split where there is one.
        where: filter expression; a volume is taken if one of its crops matches.
        target_spacing_um: (z, y, x) micrometres per voxel of the training's crops, where it has set one. Volumes come
            as they are, and a predictor resamples them; those without a voxel size are refused, as it could not.

    Raises:
        ValueError: for an unknown column or split, when no volume matches, and, naming them, for volumes without a
            voxel size where a target is set.
    """

    def __init__(
        self,
        index: CropIndex,
        *,
        split: str | Sequence[str] | None = None,
        where: str | None = None,
        target_spacing_um: Sequence[float] | None = None,
    ) -> None:
        self.index = index
        choices = [split] if split is None or isinstance(split, str) else list(split)
        found = [index.volumes(where=where, split=choice) for choice in choices]
        self.records: list[VolumeRecord] = next((records for records in found if records), [])
        if not self.records:
            raise ValueError(
                f"no volume of {index.path.name} matches where={where!r} and split={split!r}; "
                f"its splits are {', '.join(index.splits)}"
            )
        steps_to(_target(target_spacing_um), self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, position: int) -> VolumeItem:
        record = self.records[position]
        table = self.index.instances(record.id)
        return VolumeItem(
            volume=self.index.open_image(record),
            label=self.index.open_label(record),
            name=record.name,
            classes=dict(zip(table.labels.tolist(), table.classes.tolist(), strict=True)),
            intensity=record.intensity,
            split=record.split,
        )


def _target(target_spacing_um: Sequence[float] | None) -> Spacing | None:
    """The voxel size that was asked for, checked.

    Raises:
        ValueError: it is not three positive numbers.
    """
    try:
        return None if target_spacing_um is None else check_spacing(target_spacing_um)
    except ValueError:
        raise ValueError(
            f"target_spacing_um={target_spacing_um!r} is not three positive numbers; give micrometres along (z, y, x)"
        ) from None


def _plain(tensor: Any) -> torch.Tensor:
    """A plain tensor: MONAI's carries metadata that costs time in every later operation."""
    return tensor.as_tensor() if hasattr(tensor, "as_tensor") else torch.as_tensor(tensor)


def _fit(tensor: torch.Tensor, size: Sequence[int], value: float) -> torch.Tensor:
    """Crop [C, D, H, W] at the centre where it is too large, pad it at the end where it is too small."""
    for axis, wanted in enumerate(size, start=1):
        surplus = tensor.shape[axis] - wanted
        if surplus > 0:
            tensor = tensor.narrow(axis, surplus // 2, wanted)
    padding = [n for axis in (3, 2, 1) for n in (0, size[axis - 1] - tensor.shape[axis])]
    if any(padding):
        tensor = torch.nn.functional.pad(tensor, padding, value=value)
    return tensor.contiguous()
