"""ms_deform_attn3d and its baseline, `grid_sample` in a loop over the levels.

The baseline is Deformable DETR's function in plain PyTorch (Zhu et al., 2021) carried to 3D: heads become the batch,
queries and points the grid, and the samples of all levels meet the attention weights in one product.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from bench.problem import Problem
from seg3d_monai.ops import ms_deform_attn3d


def level_loop(value: Tensor, spatial_shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """One grid_sample per level. Arguments and result as those of `seg3d_monai.ops.ms_deform_attn3d`."""
    batch, _, heads, channels = value.shape
    _, queries, _, _, points, _ = locations.shape
    shapes = spatial_shapes.tolist()
    # [N, Lq, M, L, P, zyx] in [0, 1] -> [N * M, L, Lq, P, xyz] in [-1, 1]
    grids = (2 * locations - 1).flip(-1).permute(0, 2, 3, 1, 4, 5).flatten(0, 1)
    samples = []
    for level, part in enumerate(value.split([math.prod(shape) for shape in shapes], 1)):
        volume = part.permute(0, 2, 3, 1).reshape(batch * heads, channels, *shapes[level])
        sampled = grid_sample(volume, grids[:, level, :, :, None], align_corners=False)
        samples.append(sampled.squeeze(-1))
    attention = weights.permute(0, 2, 1, 3, 4).reshape(batch * heads, 1, queries, len(shapes) * points)
    mixed = (torch.cat(samples, -1) * attention).sum(-1)
    return mixed.unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)


def near_own_voxel(levels: Sequence[Sequence[int]], spread: Tensor) -> Tensor:
    """Locations [N, Lq, M, L, P, 3] around the centre of each query's own voxel, `spread` voxels of the level away."""
    centres = []
    for shape in levels:
        axes = [(torch.arange(size) + 0.5) / size for size in shape]
        centres.append(torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2))
    extents = torch.tensor(levels, dtype=torch.float32)
    return torch.cat(centres)[None, :, None, None, None] + spread / extents[:, None]


def make(
    device: str,
    dtype: torch.dtype,
    *,
    batch: int = 1,
    heads: int = 8,
    channels: int = 32,
    levels: Sequence[Sequence[int]],
    points: int = 4,
    queries: int = 0,
    is_local: bool = False,
) -> Problem:
    """Random values, weights that sum to 1, and locations anywhere or, `is_local`, a few voxels from the query's own.

    `queries` = 0 takes one query per voxel of the value, as in an encoder's self-attention.
    """
    generator = torch.Generator().manual_seed(0)
    rows = sum(math.prod(shape) for shape in levels)
    queries = queries or rows
    # Values that bfloat16 holds, so that every dtype gets the same problem; places and weights are always float32.
    value = torch.randn(batch, rows, heads, channels, generator=generator).bfloat16()
    shape = (batch, queries, heads, len(levels), points)
    if is_local:
        locations = near_own_voxel(levels, 2 * torch.randn(*shape, 3, generator=generator))
    else:
        locations = torch.rand(*shape, 3, generator=generator)
    weights = torch.randn(shape, generator=generator).flatten(3).softmax(-1).view(shape)
    return Problem(
        ours=ms_deform_attn3d,
        baseline=level_loop,
        baseline_name="grid_sample, a call per level",
        input_names=("value", "spatial_shapes", "sampling_locations", "attention_weights"),
        inputs=(
            value.to(device, dtype),
            torch.tensor(levels),  # on the CPU, where kernels look at them
            locations.to(device),
            weights.to(device),
        ),
        output_shape=(batch, queries, heads * channels),
        differentiable=(0, 2, 3),
        read_by_backward=(0, 1, 2, 3),
        num_units=math.prod(shape) * channels,
        unit="samples",
        kink_positions=(2,),
    )
