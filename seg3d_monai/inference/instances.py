"""Instances as a predictor returns them (block frame) and as the stack keeps them (volume frame, cropped, packed).

A predictor's result is a set of boxes with scores, classes and cropped masks. `Instances.place` moves it into the
volume: every mask is clipped to the ROI that the block read and shrunk to its own voxels, so that what is journalled
depends on the mask alone. This file knows no grid of blocks and no storage.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from seg3d_monai.inference.blocks import Roi

_COMPRESSION_LEVEL = 1  # packed masks shrink tenfold at level 1 already; higher levels cost time for a few percent


@dataclass(frozen=True)
class PlacedInstance:
    """One instance of one block in the volume frame.

    Attributes:
        number: its place in the predictor's result, from 0; with the block's index it is the instance's name.
        score: the predictor's score.
        class_index: foreground class from 0.
        box: (z1, y1, x1, z2, y2, x2) as predicted, volume voxels, floats.
        roi: the exact extent of the mask's voxels, volume voxels, half-open.
        mask: bool array over `roi`; every one of its six faces holds a voxel.
    """

    number: int
    score: float
    class_index: int
    box: tuple[float, ...]
    roi: Roi
    mask: NDArray[np.bool_]


@dataclass(eq=False)
class Instances:
    """What a predictor returns for one block.

    Torch tensors and sequences are converted to numpy on construction.

    Args:
        boxes: [N, 6] (z1, y1, x1, z2, y2, x2), voxels of the block's frame, half-open, floats.
        scores: [N], finite; higher is better.
        classes: [N], foreground classes from 0.
        masks: N bool arrays, each over floor(lower corner) .. ceil(upper corner) of its box.

    Raises:
        ValueError: if the lengths differ, a number is not finite, a box is inverted, a class is negative, or a mask's
            shape is not the extent of its box.
        TypeError: if a mask is not boolean or the classes are not integers.
    """

    boxes: NDArray[np.floating[Any]]
    scores: NDArray[np.floating[Any]]
    classes: NDArray[np.int64]
    masks: list[NDArray[np.bool_]]

    def __post_init__(self) -> None:
        self.boxes = _float_array(self.boxes).reshape(-1, 6) if len(self.boxes) == 0 else _float_array(self.boxes)
        self.scores = _float_array(self.scores)
        classes = _to_numpy(self.classes)
        if classes.size == 0:
            classes = classes.astype(np.int64)
        if not np.issubdtype(classes.dtype, np.integer):
            raise TypeError(f"classes have dtype {classes.dtype}; pass integers counted from 0")
        self.classes = classes.astype(np.int64, copy=False)
        self.masks = [_to_numpy(mask) for mask in self.masks]
        count = len(self.masks)
        if self.boxes.shape != (count, 6):
            raise ValueError(f"boxes have shape {self.boxes.shape} for {count} masks; pass [{count}, 6]")
        for name, array in (("scores", self.scores), ("classes", self.classes)):
            if array.shape != (count,):
                raise ValueError(f"{name} have shape {array.shape} for {count} masks; pass [{count}]")
        for name, values in (("boxes", self.boxes), ("scores", self.scores)):
            if not np.isfinite(values).all():
                number = int(np.argwhere(~np.isfinite(values))[0][0])
                raise ValueError(f"{name} of instance {number} are not finite: {values[number]}; drop such instances")
        if (self.classes < 0).any():
            raise ValueError(f"classes hold {int(self.classes.min())}; count foreground classes from 0")
        is_inverted = (self.boxes[:, 3:] < self.boxes[:, :3]).any(axis=1)
        if is_inverted.any():
            number = int(np.argmax(is_inverted))
            raise ValueError(f"box of instance {number} is inverted: {self.boxes[number].tolist()}")
        lower, upper = self._corners()
        for number, (mask, extent) in enumerate(zip(self.masks, map(tuple, (upper - lower).tolist()), strict=True)):
            if mask.dtype != np.bool_:
                raise TypeError(f"mask of instance {number} has dtype {mask.dtype}; threshold it to bool")
            if mask.shape != extent:
                raise ValueError(
                    f"mask of instance {number} has shape {mask.shape}; its box {self.boxes[number].tolist()} needs "
                    f"{extent}, floor(lower corner) .. ceil(upper corner)"
                )

    @classmethod
    def empty(cls) -> Instances:
        """No instances at all."""
        return cls(
            boxes=np.zeros((0, 6), np.float32), scores=np.zeros(0, np.float32), classes=np.zeros(0, np.int64), masks=[]
        )

    def __len__(self) -> int:
        return len(self.masks)

    def place(self, roi: Roi) -> list[PlacedInstance]:
        """The instances in the volume frame, clipped to the ROI that was read; those without a voxel are left out.

        Args:
            roi: (z1, y1, x1, z2, y2, x2) that the block read, volume voxels.

        Returns:
            One entry per instance with at least one voxel, in the predictor's order.
        """
        lower, _ = self._corners()
        origin = np.asarray(roi[:3], dtype=np.int64)
        extent = np.asarray(roi[3:], dtype=np.int64) - origin
        placed: list[PlacedInstance] = []
        for number, mask in enumerate(self.masks):
            first = np.maximum(-lower[number], 0)
            stop = np.minimum(np.asarray(mask.shape), extent - lower[number])
            if (first >= stop).any():
                continue
            mask = mask[tuple(slice(int(a), int(b)) for a, b in zip(first, stop, strict=True))]
            plane = np.asarray(mask.any(axis=0))
            ranges = [np.flatnonzero(line) for line in (mask.any(axis=(1, 2)), plane.any(axis=1), plane.any(axis=0))]
            if ranges[0].size == 0:
                continue
            low = np.array([r[0] for r in ranges])
            high = np.array([r[-1] + 1 for r in ranges])
            mask = mask[tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))]
            corner = origin + lower[number] + first
            box = self.boxes[number].astype(np.float64) + np.tile(origin, 2)
            placed.append(
                PlacedInstance(
                    number=number,
                    score=float(self.scores[number]),
                    class_index=int(self.classes[number]),
                    box=tuple(float(v) for v in box),
                    roi=_as_roi(corner + low, corner + high),
                    mask=np.ascontiguousarray(mask),
                )
            )
        return placed

    def _corners(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return np.floor(self.boxes[:, :3]).astype(np.int64), np.ceil(self.boxes[:, 3:]).astype(np.int64)


def pack_mask(mask: NDArray[np.bool_]) -> bytes:
    """A bool mask as compressed bits (C order)."""
    return zlib.compress(np.packbits(mask).tobytes(), _COMPRESSION_LEVEL)


def unpack_mask(packed: bytes, shape: Sequence[int]) -> NDArray[np.bool_]:
    """The mask that `pack_mask` packed.

    Args:
        packed: compressed bits.
        shape: the mask's extent (d, h, w).
    """
    count = int(np.prod(shape))
    bits = np.unpackbits(np.frombuffer(zlib.decompress(packed), dtype=np.uint8), count=count)
    return bits.view(np.bool_).reshape(tuple(shape))


def _as_roi(lower: NDArray[np.int64], upper: NDArray[np.int64]) -> Roi:
    z1, y1, x1 = (int(v) for v in lower)
    z2, y2, x2 = (int(v) for v in upper)
    return z1, y1, x1, z2, y2, x2


def _to_numpy(values: Any) -> NDArray[Any]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values
        return np.asarray(values.numpy())
    return np.asarray(values)


def _float_array(values: Any) -> NDArray[np.floating[Any]]:
    array = _to_numpy(values)
    if array.dtype == np.float64 or array.dtype == np.float32:
        return array
    return array.astype(np.float64)
