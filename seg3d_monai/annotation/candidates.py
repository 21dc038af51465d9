"""Which regions may be suggested for annotation, and which are annotated already; drawn from the crop index alone.

A region is a crop of the index, or one of another size about its centre. Volumes of other splits are never looked at,
nor are those of a specimen that another split holds: what is annotated there would be trained on.

Must not know: voxels, networks.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from seg3d_monai.data import CropIndex, CropSelection, VolumeRecord
from seg3d_monai.data.volume import Roi

Pool = Literal["unannotated", "all"]

MOSTLY = 0.5
"""Share of ignored voxels from which a crop counts as not annotated."""


@dataclass(frozen=True)
class Candidate:
    """A region of a volume.

    Args:
        volume: its volume.
        roi: (z1, y1, x1, z2, y2, x2) in the volume frame, inside the volume.
    """

    volume: VolumeRecord
    roi: Roi


def draw_candidates(
    index: CropIndex,
    *,
    number: int,
    pool: Pool = "unannotated",
    where: str | None = None,
    split: str = "train",
    crop_size: Sequence[int] | None = None,
    seed: int = 0,
) -> list[Candidate]:
    """Draw regions that may be suggested, as evenly from all specimens as these have crops.

    Args:
        index: the crop index.
        number: how many at most.
        pool: "unannotated", crops of unlabelled volumes and those of labelled ones that are mostly ignored; or "all".
        where: filter over the columns of the index.
        split: of the volumes; those without a split may be suggested too.
        crop_size: extent of a region, (z, y, x) voxels, clipped to the volume; the index's crops by default.
        seed: of the draw.

    Returns:
        Regions by volume and place.

    Raises:
        ValueError: for arguments out of range, and when no crop matches.
    """
    if pool not in get_args(Pool):
        raise ValueError(f"pool={pool!r} is unknown; use one of {', '.join(get_args(Pool))}")
    if number < 1:
        raise ValueError(f"candidates={number} leaves nothing to choose from; use 1 or more")
    condition = f"ignore_fraction >= {MOSTLY}" if pool == "unannotated" else None
    found = _draw(index, _both(where, condition), split, number, [seed, 0])
    if not found:
        text = f"no crop of {index.path.name} in the split {split!r} or without one matches where={where!r}"
        if pool == "unannotated":
            text += " and is not annotated; list volumes without labels in the manifest, or look at all with pool=all"
        raise ValueError(text)
    return _regions(index, found, crop_size)


def draw_annotated(
    index: CropIndex, *, number: int, split: str = "train", crop_size: Sequence[int] | None = None, seed: int = 0
) -> list[Candidate]:
    """Draw regions that are mostly annotated, which the network has seen; arguments as for `draw_candidates`.

    Returns:
        None at all where nothing is annotated.
    """
    if number < 1:
        return []
    return _regions(index, _draw(index, f"ignore_fraction < {MOSTLY}", split, number, [seed, 1]), crop_size)


def grown(roi: Roi, margin: Sequence[int], shape: Sequence[int]) -> Roi:
    """A region with a margin of (z, y, x) voxels on every side, clipped to a volume of (z, y, x) voxels."""
    z1, y1, x1 = (max(0, a - m) for a, m in zip(roi[:3], margin, strict=True))
    z2, y2, x2 = (min(n, b + m) for b, m, n in zip(roi[3:], margin, shape, strict=True))
    return z1, y1, x1, z2, y2, x2


def _both(first: str | None, second: str | None) -> str | None:
    parts = [part for part in (first, second) if part is not None and part.strip()]
    return " and ".join(f"({part})" for part in parts) if parts else None


def _draw(
    index: CropIndex, where: str | None, split: str, number: int, seed: Sequence[int]
) -> list[tuple[VolumeRecord, int]]:
    """Volumes and ids of crops that match."""
    # Known columns and splits are checked by the index before anything is left out here.
    index.volumes(split=split, labelled=None)
    held_elsewhere = {v.specimen for v in index.volumes(labelled=None) if v.split not in (split, None)}
    volumes, selection = index.select(where=where, labelled=None)
    members: dict[str, list[int]] = defaultdict(list)
    for position, volume in enumerate(volumes):
        if volume.split in (split, None) and volume.specimen not in held_elsewhere:
            members[volume.specimen].append(position)
    rng = np.random.default_rng(seed)
    sizes = {specimen: int(selection.num_crops[positions].sum()) for specimen, positions in members.items()}
    found = []
    for specimen, share in _even_shares(sizes, number).items():
        ranks = np.sort(rng.choice(sizes[specimen], share, replace=False))
        found += [_located(volumes, selection, members[specimen], int(rank)) for rank in ranks]
    return sorted(found, key=lambda pair: pair[1])


def _even_shares(sizes: dict[str, int], number: int) -> dict[str, int]:
    """How many of each to take so that all together are `number`, and none has more than another that could have more.

    What does not divide goes to the first names.
    """
    shares = dict.fromkeys(sizes, 0)
    left = min(number, sum(sizes.values()))
    while left:
        open_names = [name for name in sorted(sizes) if shares[name] < sizes[name]]
        step = max(1, left // len(open_names))
        for name in open_names[:left]:
            taken = min(step, sizes[name] - shares[name], left)
            shares[name] += taken
            left -= taken
    return shares


def _located(
    volumes: Sequence[VolumeRecord], selection: CropSelection, positions: Sequence[int], rank: int
) -> tuple[VolumeRecord, int]:
    """The crop with this rank among those of several volumes."""
    for position in positions:
        if rank < selection.num_crops[position]:
            return volumes[position], selection.crop(position, rank)
        rank -= int(selection.num_crops[position])
    raise AssertionError("rank beyond the crops of the specimen")


def _regions(
    index: CropIndex, crops: Sequence[tuple[VolumeRecord, int]], crop_size: Sequence[int] | None
) -> list[Candidate]:
    if crop_size is not None and (len(crop_size) != 3 or min(crop_size) < 1):
        raise ValueError(f"crop_size={list(crop_size)} is not three positive voxel counts; give [z,y,x]")
    found = dict.fromkeys((volume.id, _resized(index.crop(crop).roi, crop_size, volume)) for volume, crop in crops)
    by_id = {volume.id: volume for volume, _ in crops}
    return [Candidate(by_id[volume_id], roi) for volume_id, roi in found]


def _resized(roi: Roi, crop_size: Sequence[int] | None, volume: VolumeRecord) -> Roi:
    """A region of another size about the same centre, moved into the volume."""
    if crop_size is None:
        return roi
    extent = np.minimum(crop_size, volume.shape[1:])
    centred = (np.array(roi[:3]) + roi[3:] - extent) // 2
    start = np.clip(centred, 0, np.array(volume.shape[1:]) - extent)
    z1, y1, x1, z2, y2, x2 = (int(n) for n in (*start, *(start + extent)))
    return z1, y1, x1, z2, y2, x2
