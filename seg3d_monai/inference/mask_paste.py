"""From mask logits on a detection's grid to a voxel mask over its box. Must not know models."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def paste_mask(logits: Tensor, box: Tensor, threshold: float = 0.5) -> Tensor:
    """Voxels of one detection: logits interpolated at voxel centres, then thresholded.

    Args:
        logits: float [d, h, w]; the grid spans the box, bin centres at (i + 0.5) / d of its extent.
        box: float [6], voxels, half-open.
        threshold: probability at which a voxel belongs to the object, in (0, 1).

    Returns:
        bool over floor(lower corner) .. ceil(upper corner); voxels whose centre lies outside the box are False.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    lower, upper = box[:3].floor().long(), box[3:].ceil().long()
    axes = []
    inside = []
    for axis in range(3):
        centre = torch.arange(int(lower[axis]), int(upper[axis]), device=box.device) + 0.5
        extent = (box[axis + 3] - box[axis]).clamp(min=1e-6)
        axes.append((centre - box[axis]) / extent * 2 - 1)
        inside.append((centre >= box[axis]) & (centre < box[axis + 3]))
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    grid = torch.stack([x, y, z], -1)[None].to(logits.dtype)
    value = F.grid_sample(logits[None, None], grid, padding_mode="border", align_corners=False)[0, 0]
    cut = torch.logit(torch.tensor(threshold, dtype=logits.dtype))
    return (value > cut) & inside[0][:, None, None] & inside[1][:, None] & inside[2]
