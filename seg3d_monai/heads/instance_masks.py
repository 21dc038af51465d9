"""From the queries of a mask transformer to instances: score, class, box and mask logits of each.

Masks are looked at a few queries at a time, and, where queries have boxes, around their boxes only: no volume of
[queries, D, H, W] is ever built. Must not know decoders or losses.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Axes = tuple[int, int, int]
CHUNK = 1 << 24
"""Mask logits held at a time where queries have no boxes."""


@torch.no_grad()
def select_instances(
    class_logits: Tensor,
    mask_embeds: Tensor,
    mask_features: Tensor,
    mask_stride: Axes,
    image_size: Sequence[int],
    boxes: Tensor | None = None,
    *,
    score_threshold: float,
    has_no_object: bool,
) -> dict[str, Tensor | list[Tensor]]:
    """Instances of one image.

    A score is the probability of the best class times the mean probability of the mask's own cells, as published.

    Args:
        class_logits: [Q, K], or [Q, K + 1] with "no object" last.
        mask_embeds: [Q, C].
        mask_features: [C, d, h, w].
        mask_stride: (z, y, x) voxels of a cell.
        image_size: (D, H, W) voxels.
        boxes: [Q, 6], voxels; a mask is looked for there, and a quarter of the extent around it. None: everywhere.
        score_threshold: least class probability of a query that is looked at, and least score of an instance.
        has_no_object: whether the last logit is "no object".

    Returns:
        {"boxes" float32 [M, 6], whole voxels; "scores" [M], descending; "classes" int64 [M]; "mask_logits": M tensors
        float32 [d, h, w], a logit for each voxel of the box}. A query with an empty mask is no instance.
    """
    logits = class_logits.float()
    prob = logits.softmax(-1)[:, :-1] if has_no_object else logits.sigmoid()
    best, classes = prob.max(-1)
    likely = (best >= score_threshold).nonzero().squeeze(1)
    found: list[tuple[Tensor, int, Tensor, Tensor]] = []
    for query, origin, cells in _windows(likely, mask_embeds, mask_features, mask_stride, boxes):
        inside = cells > 0
        if not inside.any():
            continue
        score = best[query] * cells[inside].sigmoid().mean()
        if score >= score_threshold:
            box, voxels = _to_voxels(cells, inside, origin, mask_stride, image_size)
            found.append((score, query, box, voxels))
    found.sort(key=lambda instance: -float(instance[0]))
    queries = torch.tensor([query for _, query, _, _ in found], dtype=torch.int64, device=logits.device)
    return {
        "boxes": torch.stack([box for _, _, box, _ in found]) if found else logits.new_zeros(0, 6),
        "scores": torch.stack([score for score, _, _, _ in found]) if found else logits.new_zeros(0),
        "classes": classes[queries],
        "mask_logits": [voxels for _, _, _, voxels in found],
    }


def _windows(
    queries: Tensor, mask_embeds: Tensor, mask_features: Tensor, stride: Axes, boxes: Tensor | None
) -> Iterator[tuple[int, list[int], Tensor]]:
    """For each query its number, the first cell of a window of the mask features, and the mask logits there."""
    size = mask_features.shape[1:]
    embeds = mask_embeds.float()
    if boxes is None:
        few = max(1, CHUNK // max(1, mask_features[0].numel()))
        flat = mask_features.float().flatten(1)
        for some in queries.split(few):
            for query, cells in zip(some.tolist(), embeds[some] @ flat, strict=True):
                yield query, [0, 0, 0], cells.view(size)
        return
    margin = (boxes[:, 3:] - boxes[:, :3]) / 4
    step = torch.tensor(stride, device=boxes.device)
    end = torch.tensor(size, device=boxes.device)
    lower = ((boxes[:, :3] - margin) / step).floor().long().clamp(min=0).minimum(end - 1) - 1
    upper = ((boxes[:, 3:] + margin) / step).ceil().long().minimum(end) + 1
    corners = torch.cat([lower.clamp(min=0), upper.maximum(lower + 2).minimum(end)], 1).tolist()
    for query in queries.tolist():
        z1, y1, x1, z2, y2, x2 = corners[query]
        window = mask_features[:, z1:z2, y1:y2, x1:x2].float()
        yield query, [z1, y1, x1], torch.einsum("c,cdhw->dhw", embeds[query], window)


def _to_voxels(
    cells: Tensor, inside: Tensor, origin: Sequence[int], stride: Axes, image_size: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Box [6] of a mask and one cell around it, and its logits at the voxels there, interpolated trilinearly."""
    window, corner = [], []
    for axis in range(3):
        occupied = inside.amax([a for a in range(3) if a != axis]).nonzero()
        first = max(int(occupied[0]) - 1, 0)
        window.append(slice(first, min(int(occupied[-1]) + 2, cells.shape[axis])))
        corner.append((origin[axis] + first) * stride[axis])
    voxels = F.interpolate(
        cells[tuple(window)][None, None], scale_factor=tuple(map(float, stride)), mode="trilinear", align_corners=False
    )[0, 0]
    extent = [min(n, size - low) for n, size, low in zip(voxels.shape, image_size, corner, strict=True)]
    box = cells.new_tensor([*corner, *(low + n for low, n in zip(corner, extent, strict=True))])
    return box, voxels[: extent[0], : extent[1], : extent[2]]
