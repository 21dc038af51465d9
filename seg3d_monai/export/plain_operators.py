"""While a network is exported, its own operators and functions run as torch's: no other runtime knows ours.

`seg3d_monai.ops` chooses between kernels and `ops/reference.py` once a process, when it is imported, so there is
nothing to switch. Here a function mode answers every call of an operator on its way to torch's dispatcher, and nothing
is left different afterwards. The attention of `ops/reference.py` visits the eight corners of each sample one by one,
over which exporters take several times as long; here it is `grid_sample`, after which the operator is defined.

Not for several threads at once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from seg3d_monai.layers import deformable_attention
from seg3d_monai.ops.schemas import NAMESPACE

Axes = tuple[int, int, int]


def grid_sample_attention(
    value: Tensor, level_sizes: Sequence[Axes], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """`seg3d_monai.ops.ms_deform_attn3d`, made of `grid_sample`.

    Args:
        value: [N, S, M, Dh].
        level_sizes: (d, h, w) of each of the L levels; S is the sum of d * h * w.
        sampling_locations: [N, Lq, M, L, P, 3] in [0, 1], (z, y, x).
        attention_weights: [N, Lq, M, L, P].

    Returns:
        [N, Lq, M * Dh].
    """
    images, _, heads, width = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    volumes = value.permute(0, 2, 3, 1).flatten(0, 1)  # [N * M, Dh, S]
    places = (2 * sampling_locations - 1).flip(-1).transpose(1, 2).flatten(0, 1)  # [N * M, Lq, L, P, 3], (x, y, z)
    shares = attention_weights.transpose(1, 2).flatten(0, 1)[:, None]  # [N * M, 1, Lq, L, P]
    start, parts = 0, []
    for level, size in enumerate(level_sizes):
        cells = size[0] * size[1] * size[2]
        volume = volumes[:, :, start : start + cells].unflatten(2, size)
        read = F.grid_sample(volume, places[:, :, level, :, None], align_corners=False)[..., 0]  # [N * M, Dh, Lq, P]
        parts.append((read * shares[:, :, :, level]).sum(-1))
        start += cells
    assert points == shares.shape[4]
    total = torch.stack(parts).sum(0)  # [N * M, Dh, Lq]
    return total.view(images, heads * width, queries).transpose(1, 2)


def _attention(value: Tensor, spatial_shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    # The numbers of a tensor cannot be read while it is traced; `_level_sizes` keeps them beside it.
    return grid_sample_attention(value, spatial_shapes.level_sizes, locations, weights)  # type: ignore[attr-defined]


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool) -> Tensor:
    normed = F.layer_norm(x, weight.shape, weight, bias, eps)
    return torch.relu(normed) if relu else normed


def _group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, relu: bool) -> tuple[Tensor]:
    normed = F.group_norm(x, groups, weight, bias, eps)
    return (torch.relu(normed) if relu else normed,)  # the moments that follow are for gradients


PLAIN: dict[str, Callable[..., Any]] = {
    "ms_deform_attn3d": _attention,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
}
"""Operators by name; the others answer with results whose size depends on the data, or are for training only."""


class _PlainMode(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        space, _, name = getattr(func, "_qualified_op_name", "").partition("::")
        if space == NAMESPACE and name in PLAIN:
            return PLAIN[name](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _NoGradients:
    """What a `torch.autograd.Function` keeps for its backward pass, of which there is none."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keep nothing."""


def _run_forward(function: Any, *arguments: Any) -> Any:
    return function.forward(_NoGradients(), *arguments)


def _without_autocast(device_type: str, *_: Any, **__: Any) -> AbstractContextManager[None]:
    """In place of the regions that a network shields from autocast, of which exporters make graphs of their own."""
    if torch.is_autocast_enabled(device_type):
        raise ValueError("a network is exported in float32; leave the autocast region first")
    return nullcontext()


@contextmanager
def plain_operators() -> Iterator[None]:
    """Inside it operators of ours are torch's own, and functions with a gradient of their own are plain code.

    TorchScript cannot store such a function at all. No gradient may be asked for, and autocast is off.
    """
    level_scales = deformable_attention._level_scales

    def level_sizes(sizes: tuple[Axes, ...], strides: tuple[Axes, ...]) -> tuple[Tensor, Tensor, Tensor]:
        # Not from its cache, which would keep a tensor of the trace for later calls.
        shapes, per_cell, per_voxel = level_scales.__wrapped__(sizes, strides)
        shapes.level_sizes = sizes  # type: ignore[attr-defined]
        return shapes, per_cell, per_voxel

    with (
        mock.patch.object(deformable_attention, "_level_scales", level_sizes),
        mock.patch.object(torch.autograd.Function, "apply", classmethod(_run_forward)),
        mock.patch.object(torch, "autocast", _without_autocast),
        _PlainMode(),
    ):
        yield
