"""nms3d and its baseline, MONAI's `non_max_suppression`, on boxes of constant density or in tight clusters."""

import torch
from monai.data.box_utils import non_max_suppression
from torch import Tensor

from bench.problem import Problem
from seg3d_monai.ops import nms3d

IOU_THRESHOLD = 0.5


def scattered(num_boxes: int, stretch: tuple[float, float, float], generator: torch.Generator) -> Tensor:
    """Boxes [n, 6] at the same density for every n: centres in a cube of side 19 * cbrt(n), sides uniform 5 to 25.

    Stretching an axis, of the boxes as of the cube, leaves every IoU as it is.
    """
    centre = torch.rand(num_boxes, 3, generator=generator) * 19 * num_boxes ** (1 / 3)
    half = (5 + 20 * torch.rand(num_boxes, 3, generator=generator)) / 2
    return torch.cat([centre - half, centre + half], 1) * torch.tensor(stretch * 2)


def clustered(num_boxes: int, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Boxes [n, 6] of side 16 whose centres lie N(0, 1) around those of a few clusters far apart."""
    middle = torch.rand(num_clusters, 3, generator=generator) * 1000
    jitter = torch.randn(num_boxes, 3, generator=generator)
    centre = middle[torch.arange(num_boxes) % num_clusters] + jitter
    return torch.cat([centre - 8, centre + 8], 1)


def make(
    device: str,
    dtype: torch.dtype,
    *,
    num_boxes: int,
    num_clusters: int = 0,
    stretch: tuple[float, float, float] = (1.0, 1.0, 1.0),
    has_baseline: bool = True,
    rounded: bool = False,
) -> Problem:
    """Boxes with distinct scores; `rounded` to bfloat16's values, so that both dtypes get the same boxes."""
    generator = torch.Generator().manual_seed(0)
    if num_clusters:
        boxes = clustered(num_boxes, num_clusters, generator)
    else:
        boxes = scattered(num_boxes, stretch, generator)
    if rounded:
        boxes = boxes.bfloat16()
    scores = torch.randperm(num_boxes, generator=generator).float() / num_boxes

    def monai(boxes: Tensor, scores: Tensor) -> Tensor:
        return torch.as_tensor(non_max_suppression(boxes, scores, IOU_THRESHOLD))

    return Problem(
        ours=lambda boxes, scores: nms3d(boxes, scores, IOU_THRESHOLD),
        baseline=monai if has_baseline else None,
        baseline_name="MONAI non_max_suppression" if has_baseline else "",
        input_names=("boxes", "scores"),
        inputs=(boxes.to(device, dtype), scores.to(device)),
        output_shape=None,
        differentiable=(),
        read_by_backward=(),
        num_units=num_boxes,
        unit="boxes",
    )
