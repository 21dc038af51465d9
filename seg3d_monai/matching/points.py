"""Points at which masks are compared (Mask2Former, Cheng et al. 2022, section 3.3): no dense mask is ever built.

Points are voxels of the label volume, drawn once an image and shared by the matcher and every loss: some over the whole
crop, and some around each instance, so that a cell of a few voxels is looked at as closely as a large one. Mask2Former
draws the latter anew for each prediction where it is unsure; around the instance they serve all layers at once.

Must not know queries, costs or losses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_VALUE = -1
DILATION = 0.25
MIN_DILATION = 2.0


@dataclass(frozen=True)
class PointSet:
    """Points of one image with G instances: U of the whole crop, then k of each instance, P = U + G * k.

    Attributes:
        coordinates: int64 [P, 3], voxels.
        values: int64 [P], the label there.
        num_uniform: U.
        num_own: k.
        occupancy: float32 [G, U + k], 1 where a point is in the instance, so 0 where it is ignored; the U points,
            then the instance's own.
        valid: bool [G, U + k], False at ignored points.
    """

    coordinates: Tensor
    values: Tensor
    num_uniform: int
    num_own: int
    occupancy: Tensor
    valid: Tensor

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [P, ...] of the points as those of the whole crop [U, ...] and of each instance [G, k, ...]."""
        own = rows[self.num_uniform :]
        return rows[: self.num_uniform], own.reshape(len(self.occupancy), self.num_own, *rows.shape[1:])


@torch.no_grad()
def sample_points(target: Mapping[str, Tensor], *, num_uniform: int, num_own: int) -> PointSet:
    """Draw the points of one image (torch's global generator), with replacement.

    Args:
        target: {"label" int64 [D, H, W], "ids" int64 [G], "boxes" float [G, 6], ...}.
        num_uniform: points over the whole crop, >= 0.
        num_own: points of each instance, >= 0, over its box dilated on each side by a quarter of its extent, by at
            least 2 voxels, and clipped to the crop.

    Returns:
        The points, also without any instance.
    """
    label, boxes = target["label"], target["boxes"]
    size = torch.tensor(label.shape, device=label.device)
    uniform = _draw(torch.zeros_like(size), size, num_uniform)
    margin = ((boxes[:, 3:] - boxes[:, :3]) * DILATION).clamp(min=MIN_DILATION)
    lower = (boxes[:, :3] - margin).floor().long().clamp(min=0).minimum(size - 1)
    upper = (boxes[:, 3:] + margin).ceil().long().minimum(size).maximum(lower + 1)
    coordinates = torch.cat([uniform, _draw(lower, upper, num_own).reshape(-1, 3)])
    return point_set(target, coordinates, num_uniform=num_uniform, num_own=num_own)


def point_set(target: Mapping[str, Tensor], coordinates: Tensor, *, num_uniform: int, num_own: int) -> PointSet:
    """Look given points up in the label volume.

    Args:
        target: {"label" int64 [D, H, W], "ids" int64 [G], ...}.
        coordinates: int64 [P, 3], P = num_uniform + G * num_own, voxels of the crop.
        num_uniform: U.
        num_own: k.
    """
    ids = target["ids"]
    z, y, x = coordinates.unbind(1)
    values = target["label"][z, y, x]
    uniform = values[:num_uniform].expand(len(ids), num_uniform)
    members = torch.cat([uniform, values[num_uniform:].reshape(len(ids), num_own)], 1)
    return PointSet(
        coordinates=coordinates,
        values=values,
        num_uniform=num_uniform,
        num_own=num_own,
        occupancy=(members == ids[:, None]).float(),
        valid=members != IGNORED_VALUE,
    )


def _draw(lower: Tensor, upper: Tensor, count: int) -> Tensor:
    """`count` voxels int64 [..., count, 3] of boxes int64 [..., 3], [..., 3)."""
    extent = (upper - lower)[..., None, :]
    share = torch.rand(*lower.shape[:-1], count, 3, device=lower.device)
    return lower[..., None, :] + (share * extent).long()


def point_features(features: Tensor, stride: Sequence[float], coordinates: Tensor) -> Tensor:
    """Features at the centres of voxels, interpolated trilinearly; `batch_point_features` of one image.

    Args:
        features: [C, d, h, w] of a level.
        stride: (z, y, x) voxels of a cell.
        coordinates: int64 [P, 3], voxels.

    Returns:
        [P, C], float32 or, of float64 features, float64; differentiable in the features.
    """
    return batch_point_features(features[None], stride, [coordinates])[0]


def batch_point_features(features: Tensor, stride: Sequence[float], coordinates: Sequence[Tensor]) -> list[Tensor]:
    """Features at the centres of voxels, interpolated trilinearly; constant past the outermost cells' centres.

    The cells that any point needs are read once: only they are converted to float32, and their gradients are summed in
    float32. The backward pass writes one map for the whole batch.

    Args:
        features: [N, C, d, h, w] of a level; cell j covers voxels j * stride to (j + 1) * stride.
        stride: (z, y, x) voxels of a cell.
        coordinates: for each image, int64 [P_n, 3], voxels.

    Returns:
        For each image [P_n, C], float32 or, of float64 features, float64; differentiable in the features.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    rows = features.movedim(1, -1).flatten(0, 3)  # a view where the channels are last in memory
    counts = [len(points) for points in coordinates]
    corners, weights = _corners(torch.cat(list(coordinates)), stride, features.shape[2:], dtype)
    if not len(corners):
        return [rows[:0].to(dtype) for _ in counts]
    cells_of_image = features[0, 0].numel()
    first = torch.cat([corners.new_full((count, 1), n * cells_of_image) for n, count in enumerate(counts)])
    read: Tensor = _WeightedRows.apply(rows, corners + first, weights)
    return list(read.split(counts))


class _WeightedRows(torch.autograd.Function):
    """Sums [P, C] of the rows of a table [R, C] at int64 [P, k], times weights [P, k], in the weights' dtype.

    Both passes are an `embedding_bag` over the rows that occur: the forward pass has a bag of k rows for each sum, the
    backward pass a bag of gradients for each row. One sort serves both.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        rows, order = index.flatten().sort()
        used, slots, counts = torch.unique_consecutive(rows, return_inverse=True, return_counts=True)
        bags = torch.empty_like(slots).scatter_(0, order, slots).view_as(index)
        ctx.save_for_backward(used, order, counts.cumsum(0) - counts, weights)
        ctx.shape, ctx.dtype = table.shape, table.dtype
        return F.embedding_bag(bags, table[used].to(weights.dtype), per_sample_weights=weights, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        used, order, starts, weights = ctx.saved_tensors
        sums = F.embedding_bag(
            order // weights.shape[1],
            grad.contiguous(),
            starts,
            per_sample_weights=weights.flatten()[order],
            mode="sum",
        ).to(ctx.dtype)
        return sums.new_zeros(ctx.shape).index_copy_(0, used, sums), None, None


def _corners(points: Tensor, stride: Sequence[float], size: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Row-major indices int64 [P, 8] of the cells around each point, and their weights [P, 8]."""
    index = points.new_zeros(len(points), 1)
    weight = torch.ones_like(index, dtype=dtype)
    for axis in range(3):
        position = ((points[:, axis].to(dtype) + 0.5) / stride[axis] - 0.5).clamp(0, size[axis] - 1)
        lower = position.floor()
        share = position - lower
        cells = torch.stack([lower, (lower + 1).clamp(max=size[axis] - 1)], 1).long()
        index = (index[:, :, None] * size[axis] + cells[:, None]).flatten(1)
        weight = (weight[:, :, None] * torch.stack([1 - share, share], 1)[:, None]).flatten(1)
    return index, weight
