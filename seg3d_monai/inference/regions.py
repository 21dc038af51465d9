"""In which region of an atlas each object lies: voxels of every (object, region) counted block by block.

The atlas has a voxel size of its own and is read where a block lies on it, so memory holds one block of it and the
pairs that occur. This file knows label volumes; it must not know what else is measured.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from seg3d_monai.data.volume import Volume, check_spacing, open_volume
from seg3d_monai.inference.blocks import Roi

_PENDING_ROWS = 100_000  # pairs of single blocks that wait until they are added up

_Integers = NDArray[np.int64]
_Pairs = tuple[_Integers, NDArray, _Integers]  # id of an object, id of a region, voxels in both


class Regions:
    """How many voxels of each object lie in each region of an atlas; only pairs that occur are held.

    Args:
        atlas: label volume of regions; its first corner is the labels' first corner.
        atlas_spacing: (z, y, x) micrometre per voxel of the atlas; None is that of its metadata.
        labels: the objects' volume.
        spacing_um: (z, y, x) micrometre per voxel of the labels, or None.

    Raises:
        ValueError: if a voxel size is unknown and the shapes differ, or the atlas ends before the labels do.
    """

    def __init__(
        self,
        atlas: Volume,
        atlas_spacing: Sequence[float] | None,
        labels: Volume,
        spacing_um: Sequence[float] | None,
    ) -> None:
        own_um = atlas.spacing_um if atlas_spacing is None else check_spacing(atlas_spacing, "atlas_spacing")
        if own_um is None or spacing_um is None:
            if atlas.shape != labels.shape:
                missing = "atlas; pass atlas_spacing" if own_um is None else "labels; pass spacing"
                raise ValueError(
                    f"atlas has shape {atlas.shape[1:]} and the labels have {labels.shape[1:]} (z, y, x); to lay one "
                    f"on the other takes both voxel sizes, and there is none for the {missing} (z, y, x)"
                )
            own_um = spacing_um = (1.0, 1.0, 1.0)  # the same grid
        self._atlas = atlas
        self._nearest = []
        for axis, extent, step, own_extent, own_step in zip(
            "zyx", labels.shape[1:], spacing_um, atlas.shape[1:], own_um, strict=True
        ):
            if extent * step > (own_extent + 1) * own_step:
                raise ValueError(
                    f"atlas is {own_extent * own_step:g} um long along {axis} and the labels {extent * step:g} um; "
                    "register it to this stack, or correct its voxel size with atlas_spacing (--atlas_spacing)"
                )
            # A centre on a face between two atlas voxels goes to the lower one, however the quotient is rounded.
            place = np.floor((np.arange(extent) + 0.5) * step / own_step - 1e-9).astype(np.int64)
            self._nearest.append(np.clip(place, 0, own_extent - 1))
        empty = np.zeros(0, np.int64)
        self._pairs = [(empty, np.zeros(0, atlas.dtype), empty)]

    def add(self, codes: NDArray[np.int32], ids: _Integers, roi: Roi) -> None:
        """Count a block.

        Args:
            codes: [d, h, w], 0 = background.
            ids: of the codes 1, 2, ...
            roi: (z1, y1, x1, z2, y2, x2) of the block, voxels of the labels.
        """
        nearest = [places[low:high] for places, low, high in zip(self._nearest, roi[:3], roi[3:], strict=True)]
        block = self._atlas.read([int(p[0]) for p in nearest] + [int(p[-1]) + 1 for p in nearest])[0]
        regions, ranks = np.unique(block, return_inverse=True)
        ranks = ranks.reshape(block.shape)[np.ix_(*(places - places[0] for places in nearest))]
        keys = codes.astype(np.int64) * len(regions) + ranks
        starts, lengths = find_runs(keys)
        code, rank = np.divmod(keys.reshape(-1)[starts], len(regions))
        inside = code > 0
        self._pairs.append(_added((ids[code[inside] - 1], regions[rank[inside]], lengths[inside])))
        if sum(len(pairs[0]) for pairs in self._pairs[1:]) > 2 * len(self._pairs[0][0]) + _PENDING_ROWS:
            self._fold()

    def columns(self, num_voxels: _Integers) -> dict[str, NDArray]:
        """`region` and `region_share` of every object.

        Args:
            num_voxels: voxels of each object that was added, by ascending id.
        """
        self._fold()
        ids, regions, voxels = self._pairs[0]
        order = np.lexsort((regions, -voxels, ids))
        best = order[np.unique(ids[order], return_index=True)[1]]
        return {"region": regions[best], "region_share": voxels[best] / num_voxels}

    def _fold(self) -> None:
        ids, regions, voxels = (np.concatenate(part) for part in zip(*self._pairs, strict=True))
        self._pairs = [_added((ids, regions, voxels))]


def _added(pairs: _Pairs) -> _Pairs:
    """Add up the voxels of equal (id, region)."""
    ids, regions, voxels = pairs
    if len(ids) == 0:
        return pairs
    order = np.lexsort((regions, ids))
    ids, regions, voxels = ids[order], regions[order], voxels[order]
    is_first = np.ones(len(ids), bool)
    is_first[1:] = (ids[1:] != ids[:-1]) | (regions[1:] != regions[:-1])
    starts = np.flatnonzero(is_first)
    return ids[starts], regions[starts], np.add.reduceat(voxels, starts)


def open_atlas(atlas: str | os.PathLike[str] | Volume) -> Volume:
    """The label volume of regions.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if it holds no labels.
    """
    volume = atlas if isinstance(atlas, Volume) else open_volume(atlas)
    check_labels("atlas", volume, "save the numbers of its regions as one volume of integers")
    return volume


def check_labels(name: str, volume: Volume, mend: str) -> None:
    """See that a volume has one channel of whole numbers.

    Raises:
        ValueError: names the argument `name` and the way to mend it.
    """
    if volume.shape[0] != 1 or volume.dtype.kind not in "iub":
        place = "" if volume.path is None else f" {volume.path}"
        raise ValueError(f"{name}{place} has {volume.shape[0]} channel(s) of {volume.dtype}, no labels; {mend}")


def find_runs(array: NDArray) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Start (in the flattened array) and length of every run of equal values along the last axis."""
    is_start = np.ones(array.shape, bool)
    np.not_equal(array[..., 1:], array[..., :-1], out=is_start[..., 1:])
    starts = np.flatnonzero(is_start)
    return starts, np.diff(starts, append=array.size)
