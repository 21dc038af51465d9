"""Voxel masks of detections out of logits on grids over their boxes: the Python function."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from seg3d_monai.ops.arguments import FLOATING, check_boxes, check_tensor, check_values_finite


def paste_masks3d(
    logits: Tensor | Sequence[Tensor], boxes: Tensor, threshold: float = 0.5
) -> tuple[Tensor, list[Tensor]]:
    """Interpolate logits trilinearly at voxel centres and threshold them.

    A grid spans its box: the centre of bin i of d lies at (i + 0.5) / d of the box's extent, and beyond the outermost
    centres the outermost value holds, as with `grid_sample`'s "border" padding. Not differentiable.

    Args:
        logits: [N, d, h, w], or N grids [d, h, w] each of its own size; float64 grids are interpolated in float64, any
            other in float32.
        boxes: [N, 6], voxels, finite; half-open.
        threshold: probability above which a voxel belongs to the object, between 0 and 1.

    Returns:
        rois int64 [N, 6]: floor(lower corner) and ceil(upper corner) of each box; and N bool tensors over these, where
        voxels whose centre lies outside the box are False. All on the CPU, where labels are painted.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not fit, a box is not finite or its corners are swapped, or the threshold is out of range.
    """
    check_boxes("boxes", boxes, FLOATING)
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be a probability between 0 and 1, got {threshold!r}")
    if len(logits) != len(boxes):
        raise ValueError(f"logits must have one grid per box, got {len(logits)} for {len(boxes)} boxes")
    if isinstance(logits, Tensor):
        check_tensor("logits", logits, "N, d, h, w", FLOATING)
        shapes = [logits.shape[1:]] * len(boxes)
        values = logits.detach().reshape(-1)
    else:
        for grid in logits:
            check_tensor("a grid of logits", grid, "d, h, w", FLOATING)
        shapes = [grid.shape for grid in logits]
        values = torch.cat([grid.detach().reshape(-1) for grid in logits]) if logits else boxes.new_empty(0)
    if any(0 in shape for shape in shapes):
        raise ValueError("a grid of logits has no bin on an axis; give at least one")
    corners = boxes.detach().cpu().double()
    check_values_finite("boxes", corners)
    is_swapped = (corners[:, :3] > corners[:, 3:]).any(1)
    if bool(is_swapped.any()):
        row = int(is_swapped.nonzero()[0])
        raise ValueError(f"boxes[{row}] = {corners[row].tolist()} has its corners swapped; give the lower one first")
    values = (values if values.dtype == torch.float64 else values.float()).cpu()
    sizes = torch.tensor([tuple(shape) for shape in shapes], dtype=torch.int64).reshape(-1, 3)
    rois, voxels = torch.ops.seg3d.paste_masks3d(values, sizes, corners, math.log(threshold / (1 - threshold)))
    extents = (rois[:, 3:] - rois[:, :3]).tolist()
    parts = voxels.split([math.prod(extent) for extent in extents])
    return rois, [part.view(extent) for part, extent in zip(parts, extents, strict=True)]
