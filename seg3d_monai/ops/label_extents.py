"""Voxels, sums of coordinates and extents of labels: the Python function."""

from typing import NamedTuple

import torch
from torch import Tensor

from seg3d_monai.ops.arguments import check_tensor


class LabelExtents(NamedTuple):
    """A row for each label from 1; zeros where a label has no voxel.

    voxels: int64 [L].
    sums: int64 [L, 3], sums of the voxels' z, y, x.
    lower: int64 [L, 3], lowest z, y, x.
    upper: int64 [L, 3], highest z, y, x, plus one.
    """

    voxels: Tensor
    sums: Tensor
    lower: Tensor
    upper: Tensor


def label_extents(labels: Tensor, num_labels: int) -> LabelExtents:
    """Measure the labels of a volume.

    Args:
        labels: int32 [D, H, W], 0 (background) to num_labels, with any strides.
        num_labels: L, the largest label that may occur.

    Returns:
        A row for each label from 1 to L.

    Raises:
        TypeError: `labels` has the wrong type or dtype.
        ValueError: the shape is wrong, or num_labels is negative.
        RuntimeError: a label is not in 0 to num_labels.
    """
    check_tensor("labels", labels, "D, H, W", (torch.int32,))
    if num_labels < 0:
        raise ValueError(f"num_labels must be 0 or more, got {num_labels}")
    rows: Tensor = torch.ops.seg3d.label_extents(labels, num_labels)
    return LabelExtents(rows[:, 0], *rows[:, 1:].split(3, 1))
