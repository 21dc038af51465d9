"""Training targets out of a label crop: exact boxes, classes, ids, and fragments turned into ignore.

Targets are always derived from the label volume after the augmentation, so that boxes are the exact extents of the
voxels that the model sees. Masks stay a label volume with ids; no dense stack of masks is ever made.

Must not know: files, the crop index, transforms.
"""

from collections.abc import Mapping
from typing import TypedDict

import numpy as np
import torch
from scipy import ndimage

IGNORE = -1
_DENSE_LUT = 1 << 24  # entries of a lookup table that are still cheaper than hashing


class Targets(TypedDict):
    """What is known about one crop; G instances.

    label: int64 [D, H, W], 0 background, -1 ignore, else an instance's id.
    ids: int64 [G], ascending.
    boxes: float32 [G, 6], (z1, y1, x1, z2, y2, x2) in voxels of the crop, half-open, exact extents of the id's voxels.
    classes: int64 [G], from 0.
    """

    label: torch.Tensor
    ids: torch.Tensor
    boxes: torch.Tensor
    classes: torch.Tensor


def compact_labels(label: np.ndarray, ignore: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Renumber the ids of a label array to 1..G by rank.

    Args:
        label: integer array of any shape; 0 is background, negative values and `ignore` are ignore.
        ignore: further value that stands for ignore, such as the dtype's maximum.

    Returns:
        codes: int32 array of the same shape, 0 background, -1 ignore, 1..G the ids by rank.
        ids: int64 [G], ascending; ``ids[code - 1]`` is the id before.
    """
    if label.size == 0:
        return np.zeros(label.shape, np.int32), np.zeros(0, np.int64)
    low, high = int(label.min()), int(label.max())
    if ignore is not None and (high == ignore or low == ignore):
        known = label[label != ignore]
        low = min(int(known.min()), 0) if known.size else 0
        high = max(int(known.max()), 0) if known.size else 0
    if low >= IGNORE and high < _DENSE_LUT:
        # One extra entry in front for -1 and, when needed, a detour for the ignore value, which may be 2**32 - 1.
        keys = label.astype(np.int64)
        if ignore is not None:
            keys[label == ignore] = IGNORE
        keys += 1
        present = np.zeros(high + 2, bool)
        present[keys.reshape(-1)] = True
        ids = np.flatnonzero(present[2:]) + 1
        table = np.zeros(high + 2, np.int32)
        table[0] = IGNORE
        table[ids + 1] = np.arange(1, len(ids) + 1, dtype=np.int32)
        return table[keys], ids.astype(np.int64)
    values, inverse = np.unique(label, return_inverse=True)
    foreground = values > 0
    if ignore is not None:
        foreground &= values != ignore
    table = np.where(values == 0, 0, IGNORE).astype(np.int32)
    table[foreground] = np.arange(1, int(foreground.sum()) + 1)
    return table[inverse].reshape(label.shape), values[foreground].astype(np.int64)


def instance_extents(codes: np.ndarray, num_ids: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and sizes of the ids 1..num_ids of a 3D array.

    Args:
        codes: integer [D, H, W]; values below 1 are not instances.
        num_ids: G, the largest id.

    Returns:
        boxes: int64 [G, 6], half-open; zeros for an id without voxels.
        voxels: int64 [G].
    """
    boxes = np.zeros((num_ids, 6), np.int64)
    if num_ids == 0:
        return boxes, np.zeros(0, np.int64)
    for row, found in enumerate(ndimage.find_objects(codes, max_label=num_ids)):
        if found is not None:
            boxes[row] = [axis.start for axis in found] + [axis.stop for axis in found]
    voxels = np.bincount(np.maximum(codes, 0).reshape(-1), minlength=num_ids + 1)[1:]
    return boxes, voxels.astype(np.int64)


def derive_targets(
    label: np.ndarray | torch.Tensor,
    *,
    ids: np.ndarray | None = None,
    classes: Mapping[int, int] | int = 0,
    full_voxels: Mapping[int, int] | None = None,
    min_voxels: int = 20,
    min_visible: float = 0.1,
    min_object_voxels: int = 0,
) -> Targets:
    """Derive the targets of one crop from its label array.

    An instance of which only a fragment is visible is neither background nor a fair target: its voxels become ignore.
    It is a fragment when less than `min_visible` of its voxels are visible, or when it was cut and fewer than
    `min_voxels` are left. Cut means that voxels are missing and that it reaches a face of the crop or lost half of
    itself: a zoomed-out instance in the middle is whole, and a small but whole instance is a target whatever its size.

    Args:
        label: integer [D, H, W]; 0 background, -1 ignore, else ids.
        ids: int64 [K], ascending; where given, `label` holds k in place of ``ids[k - 1]``, which spares a search.
        classes: class of each id, or one class for all.
        full_voxels: voxels of each id in its whole volume; without it, or for ids it lacks, an instance counts as whole
            unless it reaches a face of the crop.
        min_voxels: least number of visible voxels of a cut instance.
        min_visible: least visible fraction of a cut instance, 0 to 1.
        min_object_voxels: instances with fewer voxels in their whole volume are ignore: debris and slips of the pen
            look like noise, and a detector that must find them finds noise.

    Returns:
        The targets; G may be 0.

    Raises:
        ValueError: if `label` is not an integer array [D, H, W], holds more than `ids`, or an id has no class.
    """
    array = label.detach().cpu().numpy() if isinstance(label, torch.Tensor) else np.asarray(label)
    if array.ndim != 3 or array.dtype.kind not in "iu":
        raise ValueError(f"label has shape {array.shape} and dtype {array.dtype}; give an integer array [D, H, W]")
    if ids is None:
        codes, ids = compact_labels(array)
    elif array.size and not IGNORE <= int(array.min()) <= int(array.max()) <= len(ids):
        raise ValueError(
            f"label holds {int(array.min())} to {int(array.max())} for {len(ids)} ids; give -1 to their number"
        )
    else:
        codes = array
    boxes, voxels = instance_extents(codes, len(ids))

    known = full_voxels if full_voxels is not None else {}
    full = np.array([known.get(int(i), 0) for i in ids], np.int64)
    touches = (boxes[:, :3] == 0).any(axis=1) | (boxes[:, 3:] == np.array(array.shape)).any(axis=1)
    unknown = full == 0
    missing = unknown | (voxels < full)
    cut = missing & (touches | (~unknown & (2 * voxels < full)))
    debris = ~unknown & (full < min_object_voxels)
    fragment = debris | (cut & (voxels < min_voxels)) | (~unknown & (voxels < min_visible * full))

    table = np.empty(len(ids) + 2, np.int64)
    table[0], table[-1] = 0, IGNORE  # code -1 reads the last entry
    table[1:-1] = np.where(fragment, IGNORE, ids)
    keep = ~fragment & (voxels > 0)
    kept = ids[keep]
    if isinstance(classes, Mapping):
        without = [int(i) for i in kept if int(i) not in classes]
        if without:
            raise ValueError(f"label ids {without[:10]} have no class; add them to the class table")
        kept_classes = np.array([classes[int(i)] for i in kept], np.int64)
    else:
        kept_classes = np.full(len(kept), classes, np.int64)
    return Targets(
        label=torch.from_numpy(table[codes]),
        ids=torch.from_numpy(kept),
        boxes=torch.from_numpy(boxes[keep].astype(np.float32)),
        classes=torch.from_numpy(kept_classes),
    )
