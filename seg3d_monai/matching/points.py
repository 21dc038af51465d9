"""Points at which masks are compared (Mask2Former, Cheng et al. 2022, section 3.3): no dense mask is ever built.

Points are voxels of the label volume, drawn once an image and shared by the matcher and every loss: some over the whole
crop, and some around each instance, so that a cell of a few voxels is looked at as closely as a large one. Mask2Former
draws the latter anew for each prediction where it is unsure; around the instance they serve all layers at once.

Must not know queries, costs or losses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
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

    The cells that any point of an image needs are read once, all images in one gather: only they are converted to
    float32, their gradients are summed in float32, and the backward pass writes one map for the whole batch.

    Args:
        features: [N, C, d, h, w] of a level; cell j covers voxels j * stride to (j + 1) * stride.
        stride: (z, y, x) voxels of a cell.
        coordinates: for each image, int64 [P_n, 3], voxels.

    Returns:
        For each image [P_n, C], float32 or, of float64 features, float64; differentiable in the features.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    cells, inverse, weights = [], [], []
    for points in coordinates:
        corner, weight = _corners(points, stride, features.shape[2:], dtype)
        used, index = torch.unique(corner, return_inverse=True)
        cells.append(used)
        inverse.append(index)
        weights.append(weight)
    rows = features.movedim(1, -1).flatten(0, 3)  # a view where the channels are last in memory
    cells_of_image = features[0, 0].numel()
    wanted = torch.cat([used + n * cells_of_image for n, used in enumerate(cells)])
    read: Tensor = _DistinctRows.apply(rows, wanted)
    tables = read.to(dtype).split([len(used) for used in cells])
    return [
        F.embedding_bag(index, table, per_sample_weights=weight, mode="sum") if len(index) else table[:0]
        for index, table, weight in zip(inverse, tables, weights, strict=True)
    ]


class _DistinctRows(torch.autograd.Function):
    """Rows [K, C] of a table [R, C] at indices int64 [K], no two alike: a gradient is copied, not added up."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = len(table)
        return table.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_rows, grad.shape[1]).index_copy_(0, index, grad), None


def _corners(points: Tensor, stride: Sequence[float], size: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Row-major indices int64 [P, 8] of the cells around each point, and their weights [P, 8]."""
    lower, share = [], []
    for axis in range(3):
        position = ((points[:, axis].to(dtype) + 0.5) / stride[axis] - 0.5).clamp(0, size[axis] - 1)
        cell = position.floor()
        lower.append(cell.long())
        share.append(position - cell)
    index, weight = [], []
    for corner in product((0, 1), repeat=3):
        z, y, x = ((lower[a] + corner[a]).clamp(max=size[a] - 1) for a in range(3))
        wz, wy, wx = (share[a] if corner[a] else 1 - share[a] for a in range(3))
        index.append((z * size[1] + y) * size[2] + x)
        weight.append(wz * wy * wx)
    return torch.stack(index, 1), torch.stack(weight, 1)
