"""How many objects touch another one: looked up in the label volumes around a sample of objects.

Must not know: rules, bundles, torch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from seg3d_monai.data import CropIndex, VolumeRecord

MOST_LOOKED_AT = 400
"""Objects are enough for a share that is right to 5 % (two standard errors)."""
LARGEST_REGION = 2**24
"""Voxels around an object that are read at most; larger objects are not looked at."""


def touching_share(
    index: CropIndex,
    records: Sequence[VolumeRecord],
    volume: NDArray[np.int64],
    boxes: NDArray[np.int64],
    labels: NDArray[np.int64],
    *,
    seconds: float,
    seed: int = 0,
) -> tuple[float | None, int]:
    """Share of a sample of objects that touch another one, and how many were looked at.

    Args:
        index: where the labels are opened.
        records: the volumes.
        volume: int64 [n], place of each object's volume in `records`.
        boxes: int64 [n, 6], half-open, volume frame.
        labels: int64 [n], ids on disk.
        seconds: no further object is begun after so many.
        seed: of the sample.

    Returns:
        The share, None where none could be looked at, and the number.
    """
    rng = np.random.default_rng(seed)
    sample = rng.permutation(len(boxes))[:MOST_LOOKED_AT]
    end = time.monotonic() + seconds
    found: list[bool] = []
    for place in rng.permutation(np.unique(volume[sample])):  # a time limit then leaves out volumes by chance
        record = records[place]
        label = index.open_label(record)
        ignore = int(np.iinfo(label.dtype).max)
        for number in sample[volume[sample] == place]:
            if time.monotonic() > end:
                return _share(found), len(found)
            low = np.maximum(boxes[number, :3] - 1, 0)
            high = np.minimum(boxes[number, 3:] + 1, record.shape[1:])
            if (high - low).prod() > LARGEST_REGION:
                continue
            z1, y1, x1, z2, y2, x2 = (int(n) for n in (*low, *high))
            found.append(touches_another(label.read((z1, y1, x1, z2, y2, x2))[0], int(labels[number]), ignore))
    return _share(found), len(found)


def touches_another(label: NDArray[np.integer], number: int, ignore: int) -> bool:
    """Whether a voxel of an object has a face in common with one of another object.

    Args:
        label: [D, H, W], 0 is background.
        number: the object's id.
        ignore: id of voxels that nobody annotated, which are no object.
    """
    own = label == number
    other = (label > 0) & ~own & (label != ignore)
    for axis in range(3):
        before = [slice(None)] * 3
        after = [slice(None)] * 3
        before[axis], after[axis] = slice(None, -1), slice(1, None)
        one, two = tuple(before), tuple(after)
        if (own[one] & other[two]).any() or (own[two] & other[one]).any():
            return True
    return False


def _share(found: Sequence[bool]) -> float | None:
    return sum(found) / len(found) if found else None
