"""What a network's training step and its prediction take in memory, as straight lines over the number of voxels.

Two sizes are tried, for features and their gradients grow with the voxels and the rest does not. A network's layers
decide the lines, so they are measured anew for each bundle and overlay, in a second or two.

Must not know: rules, the data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from seg3d_monai.inference.precision import autocast_dtype
from seg3d_monai.planning.bundle_config import BundleConfig, Values
from seg3d_monai.planning.live_memory import OPTIMIZER_COPIES, inference_peak, training_peak, weight_bytes

Triple = tuple[int, int, int]

MOST_TRIED, LIGHT = 400_000, 50_000_000
"""Voxels of the larger of the two sizes that are tried, at most, with a network of so many bytes; a larger one is tried
on fewer, for it takes longer and more memory."""
BLOCK_BYTES, CHANNEL_BYTES = 16, 8
"""Bytes a voxel that a prediction takes beside the network: masks and labels; the block as stored and as numbers."""


@dataclass(frozen=True)
class Line:
    """offset + slope * voxels, bytes."""

    offset: float
    slope: float

    def __call__(self, voxels: float) -> float:
        return self.offset + self.slope * voxels


@dataclass(frozen=True)
class MemoryModel:
    """Memory of one network.

    Args:
        weights: bytes of its weights.
        image: bytes of one image in training, over its voxels.
        block: bytes of one block in prediction, over the voxels that it reads.
    """

    weights: int
    image: Line
    block: Line

    def training(self, crop_size: Sequence[int], batch_size: int) -> int:
        """Bytes of a training: weights, gradients, the optimizer, and the images of a step."""
        fixed = (OPTIMIZER_COPIES + 1) * self.weights
        return round(fixed + batch_size * self.image(prod(crop_size)))

    def prediction(self, read_size: Sequence[int]) -> int:
        """Bytes of a prediction of blocks that read so many voxels."""
        return round(self.weights + self.block(prod(read_size)))


def measure_memory(
    bundle: BundleConfig, values: Values, *, crop_size: Triple, objects: int, extent: Triple
) -> MemoryModel:
    """Try a training step and a prediction of one image, at two sizes each.

    Args:
        bundle: whose network and criterion are built.
        values: of the plan, that they are built with.
        crop_size: (z, y, x) voxels of the crops that are planned.
        objects: in such a crop.
        extent: (z, y, x) voxels of an object.
    """
    amp = autocast_dtype(values.get("amp", bundle.get("amp")), "cpu")
    channels = values.get("in_channels", bundle.get("in_channels"))
    quiet = {f"network_def#{name}": 1.0 for name in ("min_objectness", "score_threshold")}
    # Untrained, a network finds objects everywhere; what a trained one finds is little beside the features.
    quiet = {key: value for key, value in quiet.items() if bundle.takes(key)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, criterion = bundle.build("network_def", values).train(), bundle.build("loss", values)
        weights = weight_bytes(network)
        sizes = _two_sizes(crop_size, round(MOST_TRIED * min(1.0, LIGHT / weights)))
        steps, blocks = [], []
        for size in sizes:
            count = max(1, round(objects * prod(size) / prod(crop_size)))
            target = grid_of_objects(size, extent, count)
            peak = training_peak(network.train(), criterion, torch.rand(1, channels, *size), target, amp)
            steps.append((prod(size), max(0, peak - weights)))  # gradients are counted with the weights
        network = bundle.build("network_def", {**values, **quiet})
        for size in sizes:
            beside = prod(size) * (CHANNEL_BYTES * channels + BLOCK_BYTES)
            blocks.append((prod(size), inference_peak(network, torch.rand(1, channels, *size), amp) + beside))
    return MemoryModel(weights=weights, image=_line(steps), block=_line(blocks))


def grid_of_objects(size: Triple, extent: Triple, count: int) -> dict[str, Tensor]:
    """A target of boxes in rows, at most `count` and as many as there is room for; one at least."""
    extent = tuple(max(1, min(e, n)) for e, n in zip(extent, size, strict=True))  # type: ignore[assignment]
    label = torch.zeros(size, dtype=torch.int64)
    boxes: list[list[int]] = []
    starts = [range(0, n - e + 1, e) for n, e in zip(size, extent, strict=True)]
    for z in starts[0]:
        for y in starts[1]:
            for x in starts[2]:
                if len(boxes) < count:
                    boxes.append([z, y, x, z + extent[0], y + extent[1], x + extent[2]])
                    label[z : z + extent[0], y : y + extent[1], x : x + extent[2]] = len(boxes)
    return {
        "label": label,
        "ids": torch.arange(1, len(boxes) + 1),
        "boxes": torch.tensor(boxes, dtype=torch.float32),
        "classes": torch.zeros(len(boxes), dtype=torch.int64),
    }


def _two_sizes(crop_size: Triple, most_voxels: int) -> tuple[Triple, Triple]:
    """The crop, made smaller along its longest axes until it is cheap to try, and one of a half of its voxels."""
    large = list(crop_size)
    while prod(large) > most_voxels:
        _halve(large)
    small = list(large)
    _halve(small)
    return tuple(small), tuple(large)  # type: ignore[return-value]


def _halve(size: list[int]) -> None:
    axis = max(range(3), key=lambda a: size[a])
    size[axis] = max(1, size[axis] // 2)


def _line(points: Sequence[tuple[int, Any]]) -> Line:
    """Through two points; a slope below zero is none."""
    (v1, b1), (v2, b2) = points
    slope = max(0.0, (b2 - b1) / (v2 - v1)) if v2 > v1 else 0.0
    return Line(offset=max(0.0, b1 - slope * v1), slope=slope)
