"""What sums over a batch are divided by: numbers of images and instances.

A training step may have several batches, one after the other and on several processes. Where each batch were divided by
its own numbers, the same crops would give another gradient in another arrangement, and a crop with two instances the
weight of one with two hundred. So a criterion also takes numbers from outside: the means over the step's batches.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

Counts = Mapping[str, float]
"""{"images": N, "occupied": images that have instances, "instances": G}, of a batch or as means over batches."""


def count_targets(targets: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """`Counts` of one batch; `targets` have "ids" [G] for each image."""
    instances = [len(target["ids"]) for target in targets]
    return {
        "images": float(len(instances)),
        "occupied": float(sum(count > 0 for count in instances)),
        "instances": float(sum(instances)),
    }


def or_one(count: float) -> float:
    """The count, or 1 where it is 0 and there is nothing to divide."""
    return count or 1.0
