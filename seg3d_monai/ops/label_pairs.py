"""Which labels of two volumes share voxels: the Python function."""

import torch
from torch import Tensor

from seg3d_monai.ops.arguments import check_device, check_tensor


def label_pairs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Count the voxels of each pair of labels of two volumes, background included.

    Args:
        a: int32 [D, H, W], labels from 0, with any strides.
        b: int32 [D, H, W], the same voxels in another view.

    Returns:
        pairs int64 [P, 2] that occur, ascending by a's label, then b's; their numbers of voxels int64 [P].

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: the shapes or devices differ.
    """
    check_tensor("a", a, "D, H, W", (torch.int32,))
    check_tensor("b", b, "D, H, W", (torch.int32,))
    if a.shape != b.shape:
        raise ValueError(f"a has the shape {tuple(a.shape)} and b {tuple(b.shape)}; pass the same voxels of both")
    check_device("b", b, "a", a)
    pairs, counts = torch.ops.seg3d.label_pairs(a, b)
    return pairs, counts
