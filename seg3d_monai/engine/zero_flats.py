"""Where DeepSpeed's ZeRO keeps each parameter: float32 tensors of which every process holds a share, by stage.

Whole tensors by name become the share of this process, and shares, gathered from all, whole tensors again. DeepSpeed
itself is not imported: its optimizers are handed in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from seg3d_monai.engine.replicas import num_processes, rank

__all__ = ["Flat", "Piece", "flats_of"]


@dataclass(frozen=True)
class Piece:
    """A parameter within a flat tensor: its first element there, and how many it has there."""

    name: str
    shape: torch.Size
    start: int
    width: int


@dataclass(frozen=True)
class Flat:
    """Float32 weights that this process holds, the parameter that the optimizer knows.

    Attributes:
        weights: of one size in every process.
        pieces: parameters of which it has a share.
        num_shares: processes that hold one each; 1 where each holds all.
        is_interleaved: whether a piece is a share of its parameter (ZeRO 3), or lies in the shares laid end to end
            (ZeRO 1, 2).
    """

    weights: Tensor
    pieces: Sequence[Piece]
    num_shares: int
    is_interleaved: bool

    def gather(self, part: Tensor, device: torch.device) -> Tensor:
        """[shares, elements] on a device, of what each process holds, a tensor as large as `weights`."""
        mine = part.detach().to(device).flatten()
        if self.num_shares == 1:
            return mine[None]
        shares = mine.new_empty(self.num_shares * mine.numel())
        dist.all_gather_into_tensor(shares, mine)
        return shares.view(self.num_shares, -1)

    def split(self, shares: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every parameter in it."""
        for piece in self.pieces:
            values = self._place(shares, piece).reshape(-1)
            yield piece.name, values[: prod(piece.shape)].view(piece.shape)

    def share(self, named: Mapping[str, Tensor]) -> Tensor:
        """What this process holds of these tensors; the inverse of `split`."""
        shares = torch.zeros(self.num_shares, self.weights.numel())
        for piece in self.pieces:
            values = named[piece.name].float().flatten()
            place = self._place(shares, piece)
            place.copy_(F.pad(values, (0, place.numel() - values.numel())).view(place.shape))
        return shares[rank() if self.num_shares > 1 else 0].view(self.weights.shape)

    def _place(self, shares: Tensor, piece: Piece) -> Tensor:
        end = piece.start + piece.width
        return shares[:, piece.start : end] if self.is_interleaved else shares.view(-1)[piece.start : end]


def flats_of(stage: int, zero: Any, optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> Iterator[Flat]:
    """What DeepSpeed's optimizer of a stage holds in this process."""
    shares = num_processes()
    if stage == 0:
        for group in optimizer.param_groups:
            for p in group["params"]:
                yield Flat(p, [Piece(names[id(p)], p.shape, 0, p.numel())], 1, False)
    elif stage < 3:
        for number, weights in enumerate(zero.single_partition_of_fp32_groups):
            parameters, starts = zero.round_robin_bit16_groups[number], zero.round_robin_bit16_offsets[number]
            pieces = [Piece(names[id(p)], p.shape, s, p.numel()) for p, s in zip(parameters, starts, strict=True)]
            yield Flat(weights, pieces, shares, False)
    else:
        for parameters, weights in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            pieces, start = [], 0
            for p in parameters:
                pieces.append(Piece(names[id(p)], p.ds_shape, start, p.ds_tensor.ds_numel))
                start += p.ds_tensor.ds_numel
            yield Flat(weights, pieces, shares, True)
