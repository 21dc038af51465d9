"""Multi-scale deformable attention (Zhu et al., Deformable DETR, 2021) in 3D, with references in voxels."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from seg3d_monai.ops import ms_deform_attn3d

Axes = tuple[int, int, int]


class DeformableAttention3d(nn.Module):
    """Each query reads a few places around its reference in every level.

    Args:
        channels: channels of queries and memory.
        num_levels: levels of the memory.
        num_heads: heads; `channels` is a multiple of them.
        num_points: places that a head reads in a level.

    Raises:
        ValueError: `channels` is no multiple of `num_heads`.
    """

    def __init__(self, *, channels: int, num_levels: int, num_heads: int = 8, num_points: int = 4) -> None:
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"channels {channels} is no multiple of num_heads {num_heads}; change one of them")
        self.num_levels = num_levels
        self.num_heads = num_heads
        self.num_points = num_points
        samples = num_heads * num_levels * num_points
        self.offsets = ScaledLinear(channels, samples * 3)
        self.weights = ScaledLinear(channels, samples)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        self._initialise()

    def _initialise(self) -> None:
        for asking in (self.offsets, self.weights):
            nn.init.zeros_(asking.weight)
            nn.init.zeros_(asking.bias)
        for layer in (self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        # Head by head another direction, point by point one step further: at first, queries look around themselves.
        shape = (self.num_heads, self.num_levels, self.num_points, 3)
        distance = torch.arange(1.0, self.num_points + 1)[:, None]
        bias = (head_directions(self.num_heads)[:, None, None] * distance).expand(shape)
        with torch.no_grad():
            self.offsets.bias.copy_(bias.flatten())

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return f"num_levels={self.num_levels}, num_heads={self.num_heads}, num_points={self.num_points}"

    def forward(
        self,
        queries: Tensor,
        references: Tensor,
        memory: Tensor,
        level_sizes: Sequence[Sequence[int]],
        level_strides: Sequence[Sequence[int]],
        padding: Tensor | None = None,
    ) -> Tensor:
        """Read the memory.

        Args:
            queries: [N, Lq, C], with their positions added.
            references: voxels, [N, Lq, 3] centres, where offsets are in cells of the level, or [N, Lq, 6] boxes, where
                an offset of `num_points` goes from the centre of the box to its border; N may be 1 for all images.
            memory: [N, S, C], the cells of all levels, level after level, each in the order z, y, x.
            level_sizes: (d, h, w) of each level; S is the sum of d * h * w.
            level_strides: (z, y, x) voxels of a cell of each level.
            padding: bool [N, S], True for cells outside the valid part of an image, which read as zero.

        Returns:
            [N, Lq, C].

        Raises:
            ValueError: another number of levels than `num_levels`, or references of another width.
        """
        if not len(level_sizes) == len(level_strides) == self.num_levels:
            raise ValueError(
                f"level_sizes {list(level_sizes)} and level_strides {list(level_strides)} must have "
                f"num_levels = {self.num_levels} entries"
            )
        if references.shape[-1] not in (3, 6):
            raise ValueError(
                "references must have the shape [N, Lq, 3] (centres) or [N, Lq, 6] (boxes), "
                f"got {tuple(references.shape)}"
            )
        shapes, *scales = _level_scales(_as_axes(level_sizes), _as_axes(level_strides))
        dtype = torch.promote_types(queries.dtype, torch.float32)
        # Not blocking: a copy from the host would otherwise wait for all the work that the device still has to do.
        per_cell, per_voxel = (s.to(queries.device, dtype, non_blocking=True) for s in scales)
        # Places and weights stay in float32 where values are halved: bfloat16 is off by cells on a long axis.
        with torch.autocast(queries.device.type, enabled=False):
            asked = queries.to(dtype)
            places = self._places(asked, references.to(dtype), per_cell, per_voxel)
            weights = self.weights(asked).to(dtype)
        samples = self.num_levels * self.num_points
        weights = _softmax(weights.unflatten(-1, (self.num_heads, samples))).view(places.shape[:-1])
        value = self.value(memory)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0)
        value = value.unflatten(-1, (self.num_heads, -1))
        read: Tensor = self.output(ms_deform_attn3d(value, shapes, places, weights))
        return read

    def _places(self, queries: Tensor, references: Tensor, per_cell: Tensor, per_voxel: Tensor) -> Tensor:
        """Where each query reads, [N, Lq, heads, levels, points, 3], shares of each level's extent."""
        shape = (self.num_heads, self.num_levels, self.num_points, 3)
        if references.shape[-1] == 3:
            centre = references
            scale = per_cell[:, None].expand(shape).reshape(-1)
            offsets = self.offsets(queries, scale).to(references.dtype).unflatten(-1, shape)
        else:
            lower, upper = references.split(3, -1)
            centre = (lower + upper) / 2
            reach = (upper - lower) / (2 * self.num_points)
            scale = (reach[:, :, None] * per_voxel)[:, :, None, :, None]
            offsets = self.offsets(queries).to(references.dtype).unflatten(-1, shape) * scale
        # One row for all heads, as long as memory runs: adding triples one by one takes three times as long.
        centres = (centre[:, :, None] * per_voxel)[:, :, None, :, None].expand(-1, -1, 1, *shape[1:])
        return (offsets.flatten(3) + centres.flatten(3)).view(offsets.shape)


class ScaledLinear(nn.Linear):
    """nn.Linear in the dtype of its weights, whose results may be scaled, one by one.

    Weights are read here only, where ZeRO 3 has gathered them.
    """

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """[..., C] and a scale [O] -> [..., O]."""
        x = x.to(self.weight.dtype)
        if scale is None:
            return super().forward(x)
        # Scaled weights give scaled results: there are far fewer weights than results.
        scale = scale.to(x.dtype)
        return F.linear(x, self.weight * scale[:, None], self.bias * scale)


def _softmax(logits: Tensor) -> Tensor:
    """Softmax over the last axis. Over a dozen numbers, torch's takes five times as long as its parts on a CPU."""
    if logits.device.type != "cpu":
        return logits.softmax(-1)
    out: Tensor = _SoftmaxOfParts.apply(logits)
    return out


class _SoftmaxOfParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        powers = (logits - logits.amax(-1, keepdim=True)).exp_()
        out = powers.div_(powers.sum(-1, keepdim=True))
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        product = grad * out
        return product.addcmul_(out, product.sum(-1, keepdim=True), value=-1)


def head_directions(num_heads: int) -> Tensor:
    """Directions [num_heads, 3] spread over the sphere on a Fibonacci spiral; the largest component of each is 1."""
    turn = torch.arange(num_heads, dtype=torch.float64)
    height = 1 - (2 * turn + 1) / num_heads
    radius = (1 - height.square()).sqrt()
    angle = turn * math.pi * (3 - math.sqrt(5))
    directions = torch.stack([height, radius * angle.sin(), radius * angle.cos()], 1)
    return (directions / directions.abs().amax(1, keepdim=True)).float()


def _as_axes(levels: Sequence[Sequence[int]]) -> tuple[Axes, ...]:
    return tuple((int(level[0]), int(level[1]), int(level[2])) for level in levels)


@lru_cache(maxsize=64)
def _level_scales(sizes: tuple[Axes, ...], strides: tuple[Axes, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """On the CPU, [L, 3]: sizes int64; shares of a level's extent that a cell and that a voxel make up, float64."""
    # Kept for later calls, so never a tensor of inference mode, which autograd refuses.
    with torch.inference_mode(False):
        shapes = torch.tensor(sizes, dtype=torch.int64)
        per_cell = 1 / shapes.double()
        return shapes, per_cell, per_cell / torch.tensor(strides, dtype=torch.float64)
