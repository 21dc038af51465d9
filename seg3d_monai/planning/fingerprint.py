"""The fingerprint of a training set: what its index, and samples of its labels, say of volumes and objects.

Only the training split is looked at; what is kept back for validation must not decide anything. Time and memory are
bounded: of very many volumes, or very many objects of one volume, a regular sample is read.

Must not know: rules, bundles, torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seg3d_monai.data import CropIndex, ManifestRow, VolumeRecord, split_by_specimen
from seg3d_monai.data.manifest import location
from seg3d_monai.data.volume import NEAR_SPACING, Spacing
from seg3d_monai.planning.touching import touching_share

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST_VOLUMES, MOST_OBJECTS, OBJECTS_IN_A_ROW = 500, 200_000, 256
"""Volumes that are read; objects of each; how many neighbours in the index are taken together where there are more."""
VAL_FRACTION = 0.2
"""What the bundles hold back for validation where neither manifest nor index says."""
QUANTILES = (0, 5, 25, 50, 75, 95, 100)


@dataclass(frozen=True)
class VolumeFacts:
    """One training volume.

    Args:
        name: its name.
        specimen: what it is a part of.
        shape: (z, y, x) voxels.
        channels: image channels.
        spacing_um: (z, y, x) micrometres per voxel, None where unknown.
        low, high: grey values that the normalisation maps to 0 and 1, one a channel.
        num_objects: all its objects.
        read_share: share of them that the fingerprint holds, in (0, 1].
        foreground: share of its voxels that belong to an object.
    """

    name: str
    specimen: str
    shape: tuple[int, int, int]
    channels: int
    spacing_um: Spacing | None
    low: tuple[float, ...]
    high: tuple[float, ...]
    num_objects: int
    read_share: float
    foreground: float


@dataclass(frozen=True)
class Fingerprint:
    """What is known of a training set; n objects of v volumes.

    Args:
        volumes: the labelled volumes of the training split.
        boxes: int64 [n, 6], half-open, voxels of the volumes.
        voxels: int64 [n].
        classes: int64 [n], from 0.
        volume: int64 [n], place of each object's volume in `volumes`.
        num_classes: classes of the whole index.
        touching: share of objects with a face in common with another one, None where it was not measured.
        num_looked_at: objects that `touching` is of.
        split: in words, which volumes these are.
    """

    volumes: tuple[VolumeFacts, ...]
    boxes: Ints
    voxels: Ints
    classes: Ints
    volume: Ints
    num_classes: int = 1
    touching: float | None = None
    num_looked_at: int = 0
    split: str = "the training split"

    @property
    def spacing_um(self) -> Spacing | None:
        """Median (z, y, x) voxel size of the volumes; None where one does not know its own."""
        known = [volume.spacing_um for volume in self.volumes if volume.spacing_um is not None]
        if len(known) < len(self.volumes):
            return None
        z, y, x = np.median(np.array(known), axis=0).tolist()
        return z, y, x

    @property
    def without_spacing(self) -> list[str]:
        """Names of the volumes that do not know their voxel size."""
        return [volume.name for volume in self.volumes if volume.spacing_um is None]

    @property
    def is_whole(self) -> NDArray[np.bool_]:
        """Which objects end within their volume; all, where none does."""
        shapes = np.array([volume.shape for volume in self.volumes])[self.volume]
        inside = np.concatenate([self.boxes[:, :3] > 0, self.boxes[:, 3:] < shapes], axis=1)
        whole: NDArray[np.bool_] = np.logical_and.reduce(inside, axis=1)
        return whole if whole.any() else np.ones(len(whole), bool)

    def scales(self, target_um: Spacing | None) -> Floats:
        """Voxels of the target for one of each volume's own, [v, 3]; 1 where training does not resample.

        Args:
            target_um: (z, y, x) voxel size that crops are resampled to; None for none.
        """
        if target_um is None:
            return np.ones((len(self.volumes), 3))
        own = np.array([volume.spacing_um or target_um for volume in self.volumes])
        scales: Floats = own / np.array(target_um)
        is_near: NDArray[np.bool_] = np.logical_and.reduce(np.abs(scales - 1) <= NEAR_SPACING, axis=1)
        return np.where(is_near[:, None], 1.0, scales)

    def extents(self, target_um: Spacing | None = None) -> Floats:
        """Extent of every object's box, [n, 3] voxels of the target."""
        extents: Floats = (self.boxes[:, 3:] - self.boxes[:, :3]) * self.scales(target_um)[self.volume]
        return extents

    def sizes(self, target_um: Spacing | None = None) -> Floats:
        """Voxels of every object, [n], of the target."""
        sizes: Floats = self.voxels * self.scales(target_um).prod(axis=1)[self.volume]
        return sizes

    def shapes(self, target_um: Spacing | None = None) -> Floats:
        """Extent of every volume, [v, 3] voxels of the target."""
        shapes: Floats = np.array([volume.shape for volume in self.volumes]) * self.scales(target_um)
        return shapes

    def to_json(self) -> dict[str, Any]:
        """Numbers for people and programs; percentiles are those of 0, 5, 25, 50, 75, 95 and 100 %."""
        whole, extents = self.is_whole, self.extents()[self.is_whole]
        spacings = Counter(volume.spacing_um for volume in self.volumes)
        spacing_of = np.array([volume.spacing_um or (np.nan,) * 3 for volume in self.volumes])[self.volume[whole]]
        return {
            "volumes_are": self.split,
            "num_volumes": len(self.volumes),
            "num_specimens": len({volume.specimen for volume in self.volumes}),
            "channels": sorted({volume.channels for volume in self.volumes}),
            "spacings_um": [{"zyx": size and list(size), "volumes": n} for size, n in spacings.most_common()],
            "percentiles": list(QUANTILES),
            "size_voxels": _quantiles(self.shapes()),
            "intensity_low": _quantiles(np.array([volume.low[0] for volume in self.volumes])),
            "intensity_high": _quantiles(np.array([volume.high[0] for volume in self.volumes])),
            "foreground": _quantiles(np.array([volume.foreground for volume in self.volumes])),
            "num_objects": sum(volume.num_objects for volume in self.volumes),
            "num_objects_read": len(self.boxes),
            "num_objects_whole": int(whole.sum()),
            "objects_per_volume": _quantiles(np.array([volume.num_objects for volume in self.volumes])),
            "object_extent_voxels": _quantiles(extents),
            "object_extent_um": None if np.isnan(spacing_of).any() else _quantiles(extents * spacing_of),
            "object_voxels": _quantiles(self.voxels[whole]),
            "touching": self.touching,
            "touching_is_of": self.num_looked_at,
            "classes": {int(number): int(count) for number, count in sorted(Counter(self.classes.tolist()).items())},
        }


def take_fingerprint(index: CropIndex, *, touching_seconds: float = 10.0, seed: int = 0) -> Fingerprint:
    """Look at the labelled training volumes of an index.

    Args:
        index: the crop index.
        touching_seconds: most that may go into reading labels, to see which objects touch.
        seed: of the sample that is read there.

    Raises:
        ValueError: if no labelled volume is for training, or none of them has an object.
    """
    records, split = training_volumes(index)
    step = max(1, -(-len(records) // MOST_VOLUMES))
    records = records[::step]
    facts, tables = [], []
    for record in records:
        table = index.instances(record.id, ids=_sample_of_ids(record.num_instances))
        share = len(table) / record.num_instances if record.num_instances else 1.0
        tables.append(table)
        facts.append(
            VolumeFacts(
                name=record.name,
                specimen=record.specimen,
                shape=record.shape[1:],
                channels=record.shape[0],
                spacing_um=record.spacing_um,
                low=record.intensity.low,
                high=record.intensity.high,
                num_objects=record.num_instances,
                read_share=share,
                foreground=float(table.voxels.sum()) / share / prod(record.shape[1:]),
            )
        )
    if not sum(map(len, tables)):
        raise ValueError(
            f"the {len(records)} training volumes of {index.path.name} hold no object; there is nothing to plan from. "
            "See that the manifest's column label names label volumes and not binary masks of 0"
        )
    volume = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    fingerprint = Fingerprint(
        volumes=tuple(facts),
        boxes=np.concatenate([table.boxes for table in tables]),
        voxels=np.concatenate([table.voxels for table in tables]),
        classes=np.concatenate([table.classes for table in tables]),
        volume=volume,
        num_classes=index.num_classes,
        split=split,
    )
    labels = np.concatenate([table.labels for table in tables])
    whole = np.flatnonzero(fingerprint.is_whole)
    touching, num_looked_at = touching_share(
        index, records, volume[whole], fingerprint.boxes[whole], labels[whole], seconds=touching_seconds, seed=seed
    )
    return replace(fingerprint, touching=touching, num_looked_at=num_looked_at)


def training_volumes(index: CropIndex) -> tuple[list[VolumeRecord], str]:
    """The labelled volumes that a training on this index takes, and in words which they are.

    An index without splits is split as the bundles do it, by specimen.

    Raises:
        ValueError: if there is none.
    """
    labelled = index.volumes()
    chosen = [record for record in labelled if record.split == "train"]
    if chosen:
        return chosen, "the training split"
    if not labelled or any(record.split is not None for record in labelled):
        splits = ", ".join(sorted({str(record.split) for record in labelled})) or "none"
        raise ValueError(
            f"{index.path.name} has no labelled volume for training (splits of labelled volumes: {splits}); "
            "give labels, and the split 'train', in the manifest"
        )
    if len({record.specimen for record in labelled}) < 2:
        return labelled, "all labelled volumes, for the index has no split and one specimen only"
    rows = split_by_specimen([_row(record) for record in labelled], val_fraction=VAL_FRACTION)
    chosen = [record for record, row in zip(labelled, rows, strict=True) if row.split == "train"]
    return chosen, f"what a training takes when it holds back {VAL_FRACTION:.0%} itself, for the index has no split"


def _row(record: VolumeRecord) -> ManifestRow:
    return ManifestRow(
        name=record.name,
        image=location(record.image),
        label=None if record.label is None else location(record.label),
        axes=None,
        spacing_um=None,
        specimen=record.specimen,
        split=None,
        classes=0,
        attributes=record.attributes,
    )


def _sample_of_ids(num_objects: int) -> Ints | None:
    """Ids, from 1, of a regular sample in runs of neighbours; None for all."""
    if num_objects <= MOST_OBJECTS:
        return None
    starts = np.linspace(0, num_objects - OBJECTS_IN_A_ROW, MOST_OBJECTS // OBJECTS_IN_A_ROW).astype(np.int64)
    ids = (starts // OBJECTS_IN_A_ROW * OBJECTS_IN_A_ROW)[:, None] + np.arange(1, OBJECTS_IN_A_ROW + 1)
    return np.unique(ids)


def _quantiles(values: NDArray[Any]) -> list[Any]:
    """Percentiles of [n] numbers, or of [n, 3] as rows (z, y, x)."""
    found: Sequence[Any] = np.percentile(values, QUANTILES, axis=0).round(4).tolist()
    return list(found)
