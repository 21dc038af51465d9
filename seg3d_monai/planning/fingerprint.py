"""The fingerprint of a training set: what its index, and samples of its labels, say of volumes and objects.

Only the training split is looked at; what is kept back for validation must not decide anything. Memory is bounded: of
very many volumes some are read, and of a volume with very many objects those of a part.

Must not know: rules, bundles, torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seg3d_monai.data import CropIndex, InstanceTable, ManifestRow, VolumeRecord, split_by_specimen
from seg3d_monai.data.manifest import location
from seg3d_monai.data.volume import NEAR_SPACING, Spacing
from seg3d_monai.planning.touching import touching_share

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST_VOLUMES, MOST_OBJECTS, OBJECTS_AT_ONCE = 500, 1_000_000, 100_000
"""Volumes that are read; objects of all of them that are kept, about; objects that are read at once."""
LEAST_WHOLE = 0.1
"""Share of whole objects below which those that are cut count too."""
VAL_FRACTION = 0.2
"""What the bundles hold back for validation where neither manifest nor index says."""
QUANTILES = (0, 5, 25, 50, 75, 95, 100)
COLUMNS = tuple(field.name for field in fields(InstanceTable))


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
        part: (z1, y1, x1, z2, y2, x2) whose objects the fingerprint holds; the whole volume unless they are very many.
        num_read: objects of the part.
        foreground: share of the part's voxels that belong to an object.
    """

    name: str
    specimen: str
    shape: tuple[int, int, int]
    channels: int
    spacing_um: Spacing | None
    low: tuple[float, ...]
    high: tuple[float, ...]
    num_objects: int
    part: tuple[int, int, int, int, int, int]
    num_read: int
    foreground: float

    @property
    def part_shape(self) -> tuple[int, int, int]:
        """(z, y, x) voxels of the part."""
        z1, y1, x1, z2, y2, x2 = self.part
        return z2 - z1, y2 - y1, x2 - x1


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
        """Which objects end within their volume, or the part of it that was read; all, where nearly none does.

        In a stack of few planes only the smallest do.
        """
        parts = np.array([volume.part for volume in self.volumes])[self.volume]
        inside = np.concatenate([self.boxes[:, :3] > parts[:, :3], self.boxes[:, 3:] < parts[:, 3:]], axis=1)
        whole: NDArray[np.bool_] = np.logical_and.reduce(inside, axis=1)
        return whole if whole.mean() >= LEAST_WHOLE else np.ones(len(whole), bool)

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

    def densities(self, target_um: Spacing | None = None) -> Floats:
        """Objects of each volume in a voxel of the target, [v]."""
        parts = np.array([volume.part_shape for volume in self.volumes]) * self.scales(target_um)
        densities: Floats = np.array([volume.num_read for volume in self.volumes]) / parts.prod(axis=1)
        return densities

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

    Returns:
        What a plan is made from.

    Raises:
        ValueError: if no labelled volume is for training, or none of them has an object.
    """
    records, split = training_volumes(index)
    step = max(1, -(-len(records) // MOST_VOLUMES))
    records = records[::step]
    facts, tables = [], []
    for record in records:
        table, part = _objects_of(index, record, MOST_OBJECTS // len(records), seed)
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
                part=part,
                num_read=len(table),
                foreground=min(1.0, float(table.voxels.sum()) / prod(np.subtract(part[3:], part[:3]).tolist())),
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


def _objects_of(
    index: CropIndex, record: VolumeRecord, most: int, seed: int
) -> tuple[InstanceTable, tuple[int, int, int, int, int, int]]:
    """The objects of a volume and the region they are from: a part around one of them where they are too many."""
    shape = np.array(record.shape[1:])
    if record.num_instances <= most:
        return index.instances(record.id), (0, 0, 0, *record.shape[1:])
    chosen = int(np.random.default_rng([seed, record.id]).integers(record.num_instances)) + 1
    box = index.instances(record.id, ids=[chosen]).boxes[0]
    extent = np.maximum(1, np.round(shape * (most / record.num_instances) ** (1 / 3))).astype(np.int64)
    low = np.clip((box[:3] + box[3:] - extent) // 2, 0, shape - extent)
    parts = []
    for first in range(1, record.num_instances + 1, OBJECTS_AT_ONCE):
        last = min(record.num_instances, first + OBJECTS_AT_ONCE - 1)
        table = index.instances(record.id, ids=np.arange(first, last + 1))
        middle = (table.boxes[:, :3] + table.boxes[:, 3:]) // 2
        is_inside = np.logical_and.reduce((middle >= low) & (middle < low + extent), axis=1)
        parts.append(tuple(getattr(table, name)[is_inside] for name in COLUMNS))
    columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    z, y, x, z2, y2, x2 = (int(n) for n in (*low, *(low + extent)))
    return InstanceTable(**dict(zip(COLUMNS, columns, strict=True))), (z, y, x, z2, y2, x2)


def _quantiles(values: NDArray[Any]) -> list[Any]:
    """Percentiles of [n] numbers, or of [n, 3] as rows (z, y, x)."""
    found: Sequence[Any] = np.percentile(values, QUANTILES, axis=0).round(4).tolist()
    return list(found)
