"""roi_align3d and its baseline, `torch.nn.functional.grid_sample` with one call per image.

The baseline lays the samples of all boxes of an image one after the other along the depth of a single grid, samples
the image once and averages the samples of each bin. With adaptive sampling every box has its own number of samples,
so there it is one call per box.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from bench.problem import Problem
from seg3d_monai.ops import roi_align3d

CHUNK_BYTES = 1_450_000_000
"""Samples [C, K, samples] that one call may make; it is split between boxes only where it would make more."""
OUTSIDE = -3.0
"""A normalised coordinate so far out that grid_sample's zero padding gives 0."""


def draw_boxes(size: Sequence[int], count: int, sides: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Boxes [count, 6] inside a volume of `size` voxels: sides uniform in `sides` on each axis, places uniform."""
    extent = torch.tensor(size, dtype=torch.float32)
    longest = extent.clamp(max=sides[1])
    side = sides[0] + torch.rand(count, 3, generator=generator) * (longest - sides[0])
    corner = torch.rand(count, 3, generator=generator) * (extent - side)
    return torch.cat([corner, corner + side], 1)


def axis_samples(boxes: Tensor, axis: int, size: int, bins: int, ratio: int) -> Tensor:
    """Normalised sample coordinates [K, bins * ratio] on one axis, by RoIAlign's border rule (aligned, scale 1)."""
    start = boxes[:, axis, None] - 0.5
    extent = boxes[:, axis + 3, None] - 0.5 - start
    fraction = (torch.arange(bins * ratio, device=boxes.device) + 0.5) / (bins * ratio)
    position = start + fraction * extent
    normalised = (2 * position.clamp(0, size - 1) + 1) / size - 1
    return torch.where((position >= -1) & (position <= size), normalised, OUTSIDE)


def sample_mean(
    image: Tensor, boxes: Tensor, out: Sequence[int], ratio: Sequence[int], is_split: bool = False
) -> Tensor:
    """Pool one image [1, C, D, H, W] in boxes [K, 6] with one call of grid_sample: [K, C, d, h, w].

    On the CPU grid_sample spreads the batch over the threads, and a batch of one image runs on one. `is_split` makes a
    batch of two of the channels' halves, which is faster where there are two threads, and stores the channels last.
    """
    axes = [
        axis_samples(boxes, axis, image.shape[axis + 2], out[axis], ratio[axis]).unflatten(1, (out[axis], ratio[axis]))
        for axis in range(3)
    ]
    # Samples of a bin [rz, ry, rx] before bins [d, h, w]: the mean then runs over one long axis.
    z = axes[0].mT[:, :, None, None, :, None, None]
    y = axes[1].mT[:, None, :, None, None, :, None]
    x = axes[2].mT[:, None, None, :, None, None, :]
    grid = torch.stack(torch.broadcast_tensors(x, y, z), -1).to(image.dtype)
    grid = grid.reshape(1, len(boxes), ratio[0] * ratio[1] * ratio[2], out[0] * out[1] * out[2], 3)
    if is_split:
        image = image.contiguous(memory_format=torch.channels_last_3d)[0].unflatten(0, (2, -1))
        grid = grid.expand(2, -1, -1, -1, -1)
    samples = grid_sample(image, grid, align_corners=False).flatten(0, 1)
    return samples.mean(2).unflatten(2, out).transpose(0, 1)


def by_image(
    features: Tensor, boxes: Tensor, batch_index: Tensor, out: Sequence[int], ratio: int, is_split: bool
) -> Tensor:
    """The baseline with a fixed number of samples: one grid_sample per image, or a few where memory asks for it."""
    sample_bytes = features.shape[1] * features.element_size() * ratio**3 * out[0] * out[1] * out[2]
    pooled, rows = [], []
    for number, image in enumerate(features.split(1)):
        for row in (batch_index == number).nonzero().squeeze(1).split(max(1, CHUNK_BYTES // sample_bytes)):
            pooled.append(sample_mean(image, boxes[row], out, (ratio,) * 3, is_split))
            rows.append(row)
    return torch.cat(pooled)[torch.cat(rows).argsort()]


def by_box(features: Tensor, boxes: Tensor, batch_index: Tensor, out: Sequence[int]) -> Tensor:
    """The baseline with adaptive sampling: one grid_sample per box."""
    images = features.split(1)
    extent = (boxes[:, 3:] - 0.5) - (boxes[:, :3] - 0.5)
    ratios = (extent / extent.new_tensor(out)).ceil().int().tolist()
    boxes_apart = zip(boxes.split(1), batch_index.tolist(), ratios, strict=True)
    return torch.cat([sample_mean(images[number], box, out, ratio) for box, number, ratio in boxes_apart])


def make(
    device: str,
    dtype: torch.dtype,
    *,
    features: tuple[int, ...],
    num_boxes: int,
    sides: tuple[float, float],
    out: int | tuple[int, int, int],
    ratio: int,
    is_split: bool = False,
) -> Problem:
    """Features of the given shape [N, C, D, H, W] and boxes spread over the images in turn."""
    generator = torch.Generator().manual_seed(0)
    bins = (out, out, out) if isinstance(out, int) else out
    # Values that bfloat16 holds, so that every dtype gets the same problem.
    values = torch.randn(features, generator=generator).bfloat16().to(dtype)
    boxes = draw_boxes(features[2:], num_boxes, sides, generator)
    batch_index = torch.arange(num_boxes) % features[0]
    if ratio > 0:
        samples = num_boxes * ratio**3 * bins[0] * bins[1] * bins[2]
        baseline = partial(by_image, out=bins, ratio=ratio, is_split=is_split)
        name = "grid_sample on half the channels a thread" if is_split else "grid_sample, a call per image"
    else:
        per_axis = ((boxes[:, 3:] - boxes[:, :3]) / torch.tensor(bins)).ceil() * torch.tensor(bins)
        samples = int(per_axis.prod(1).sum())
        baseline = partial(by_box, out=bins)
        name = "grid_sample, a call per box"
    return Problem(
        ours=partial(roi_align3d, output_size=bins, sampling_ratio=ratio),
        baseline=baseline,
        baseline_name=name,
        input_names=("features", "boxes", "batch_index"),
        inputs=(values.to(device), boxes.to(device), batch_index.to(device)),
        output_shape=(num_boxes, features[1], *bins),
        differentiable=(0,),
        read_by_backward=(1, 2),
        num_units=samples * features[1],
        unit="samples",
    )
