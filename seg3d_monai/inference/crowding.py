"""A detector of limited capacity on a crowded block: the block is halved until its parts are not crowded.

A query-based detector finds at most as many instances as it has queries. Must not know models: a detector is a callable
images [N, C, D, H, W] -> N times {"boxes", "scores", "classes", "mask_logits"}.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

CROWDED_SHARE = 0.8
"""Share of the capacity at which a block is taken for crowded: near it, one object's loss cannot be told."""
MOST_HALVINGS = 3
"""How often a part is halved at most: each costs one and a half times the voxels of the step before."""

Found = dict[str, Any]
"""Tensors, and the list of mask logits."""
Network = Callable[[Tensor], Sequence[Mapping[str, Any]]]


def detect(
    network: Network,
    image: Tensor,
    *,
    capacity: int | None,
    score_threshold: float,
    halvings: int = MOST_HALVINGS,
) -> Found:
    """Instances of one image [C, D, H, W]: `detect_batch` for a batch of one."""
    return detect_batch(network, image[None], capacity=capacity, score_threshold=score_threshold, halvings=halvings)[0]


def detect_batch(
    network: Network,
    images: Tensor,
    *,
    capacity: int | None,
    score_threshold: float,
    halvings: int = MOST_HALVINGS,
) -> list[Found]:
    """Instances of each image, on the CPU; in halves, and halves of these, where there are too many for one call.

    All images go through the network together; then the crowded ones alone are looked at in parts. The halves of a part
    overlap by a quarter of its extent; each keeps the instances whose boxes are centred in its own half, so an object
    as large as the overlap is seen whole by the half that keeps it.

    Args:
        network: the detector, in evaluation mode.
        images: [N, C, D, H, W].
        capacity: the most instances that one call can find in an image; None for no limit.
        score_threshold: least score of an instance that counts towards a crowd.
        halvings: how often an image may be halved; a warning says so where that was not enough.

    Returns:
        For each image {"boxes" [M, 6] in the image's frame, "scores" [M], "classes" [M], "mask_logits": M tensors}.

    Raises:
        ValueError: the network does not return one result for each image.
    """
    results: list[Found] = [
        {
            key: value.cpu() if isinstance(value, Tensor) else [tensor.cpu() for tensor in value]
            for key, value in found.items()
        }
        for found in network(images)
    ]
    if len(results) != len(images):
        raise ValueError(f"network returned {len(results)} results for {len(images)} images; return one for each")
    for n, found in enumerate(results):
        number = int((found["scores"] >= score_threshold).sum())
        if capacity is None or number < CROWDED_SHARE * capacity:
            continue
        size = "x".join(map(str, images.shape[2:]))
        if halvings == 0:
            logger.warning(
                "%d objects in a part of %s voxels, and the model has %d queries: objects may be lost; "
                "raise num_queries or use smaller blocks",
                number,
                size,
                capacity,
            )
        else:
            logger.info("%d objects for %d queries in %s voxels: halved", number, capacity, size)
            results[n] = _in_halves(network, images[n], capacity, score_threshold, halvings - 1)
    return results


def _in_halves(network: Network, image: Tensor, capacity: int, score_threshold: float, halvings: int) -> Found:
    size = image.shape[1:]
    axis = max(range(3), key=lambda a: size[a])
    middle, overlap = size[axis] // 2, size[axis] // 8
    halves = []
    for start, end, is_lower in ((0, middle + overlap, True), (middle - overlap, size[axis], False)):
        part = detect(
            network,
            image.narrow(axis + 1, start, end - start),
            capacity=capacity,
            score_threshold=score_threshold,
            halvings=halvings,
        )
        boxes = part["boxes"]
        boxes[:, [axis, axis + 3]] += start
        centre = (boxes[:, axis] + boxes[:, axis + 3]) / 2
        halves.append(_rows(part, ((centre < middle) == is_lower).nonzero().squeeze(1)))
    return {key: _joined(halves[0][key], halves[1][key]) for key in halves[0]}


def _rows(found: Found, rows: Tensor) -> Found:
    return {
        key: value[rows] if isinstance(value, Tensor) else [value[i] for i in rows.tolist()]
        for key, value in found.items()
    }


def _joined(first: Any, second: Any) -> Any:
    return torch.cat([first, second]) if isinstance(first, Tensor) else [*first, *second]
