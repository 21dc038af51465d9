"""Two-stage query selection (DINO, Zhang et al. 2022; Mask DINO, Li et al. 2023): which memory tokens become queries.

Every token says how likely it is the middle of an object; the best become queries, each with a box around its cell.
Mask DINO replaces these boxes by the tight boxes of the tokens' first masks. Must not know true instances.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seg3d_monai.layers import MLP, LayerNorm, PixelDecoderOutput
from seg3d_monai.ops.boxes import MAX_LOG_RATIO

Axes = tuple[int, int, int]
PRIOR = 0.01
CHUNK = 1 << 24
"""Mask logits that `mask_boxes` holds at a time."""
OUTSIDE = -1e4
"""Added to a mask logit outside the box of its query: below any logit, and finite in every half type."""


class SelectedTokens(NamedTuple):
    """The best tokens of each image, best first; Q is the number asked for, or of all tokens where that is less.

    Args:
        tokens: [N, Q, C], projected and normed, with gradient.
        class_logits: float32 [N, Q, K].
        centres: float32 [N, Q, 3], centres of their cells, voxels.
        extents: float32 [N, Q, 3], extents that an object of their level has, voxels.
        scored: what is known of all S tokens, for the loss that trains the choice: "class_logits" float32 [N, S, K],
            "sizes" of the levels, "centres" and "extents" [S, 3], "padding" bool [N, S] or None.
    """

    tokens: Tensor
    class_logits: Tensor
    centres: Tensor
    extents: Tensor
    scored: dict[str, Any]


class TokenSelection(nn.Module):
    """Chooses the memory tokens that most surely are the middle of an object, one for each object.

    Published selections take the tokens of highest score. Half a dozen tokens of a nucleus score nearly alike, and in a
    crowd the queries are used up on a few nuclei. Here a token that scores less than one of the 26 around it comes
    after all those that do not, and the criterion trains the scores of all tokens, as those of a heat map of centres
    (CenterNet, Zhou et al. 2019); so queries are where objects are after some hundred steps.

    An image with fewer tokens outside the padding than queries repeats its last one.

    Args:
        channels: C of the memory.
        num_classes: K foreground classes.
        num_queries: tokens chosen of each image.
        anchor_cells: extent of an object of a level, in cells of the level.
    """

    def __init__(self, *, channels: int, num_classes: int, num_queries: int, anchor_cells: float = 4.0) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.anchor_cells = anchor_cells
        self.project = nn.Sequential(nn.Linear(channels, channels), LayerNorm(channels))
        self.class_logits = class_head(channels, num_classes)

    def extra_repr(self) -> str:
        """The settings, for `repr`: no weight tells them."""
        return f"num_queries={self.num_queries}, anchor_cells={self.anchor_cells}"

    def forward(self, decoded: PixelDecoderOutput) -> SelectedTokens:
        """The best tokens of a pixel decoder's memory."""
        projected = self.project(decoded.flat_memory)
        logits = self.class_logits(projected).float()
        scores = logits.detach().sigmoid().amax(-1)
        if decoded.flat_padding is not None:
            scores = scores.masked_fill(decoded.flat_padding, -torch.inf)
        chosen = best_tokens(scores + local_maxima(scores, decoded.sizes), self.num_queries, decoded.flat_padding)
        extents = self.anchor_cells * decoded.cell_sizes
        return SelectedTokens(
            tokens=_rows(projected, chosen),
            class_logits=_rows(logits, chosen),
            centres=decoded.centres[chosen],
            extents=extents[chosen],
            scored={
                "class_logits": logits,
                "sizes": decoded.sizes,
                "centres": decoded.centres,
                "extents": extents,
                "padding": decoded.flat_padding,
            },
        )


class QuerySelection(nn.Module):
    """The selected tokens and the box that each predicts.

    Args:
        channels: C of the memory.
        num_classes, num_queries, anchor_cells: see `TokenSelection`; a predicted box is refined from a base box around
            the token's cell, of the extent that an object of its level has.
    """

    def __init__(self, *, channels: int, num_classes: int, num_queries: int, anchor_cells: float) -> None:
        super().__init__()
        self.selection = TokenSelection(
            channels=channels, num_classes=num_classes, num_queries=num_queries, anchor_cells=anchor_cells
        )
        self.box_deltas = box_head(channels)

    def forward(self, decoded: PixelDecoderOutput) -> tuple[SelectedTokens, Tensor]:
        """Memory -> the chosen tokens and their boxes, float32 [N, Q, 6], voxels."""
        selected = self.selection(decoded)
        half = selected.extents / 2
        anchors = torch.cat([selected.centres - half, selected.centres + half], -1)
        return selected, refine_boxes(self.box_deltas(selected.tokens), anchors)


@torch.no_grad()
def local_maxima(scores: Tensor, sizes: Sequence[Axes]) -> Tensor:
    """Which tokens score at least as much as each of the 26 around them on their level.

    Args:
        scores: [N, S], level after level.
        sizes: (d, h, w) of each level, cells.

    Returns:
        bool [N, S].
    """
    found = []
    for level, size in zip(scores.split([d * h * w for d, h, w in sizes], 1), sizes, strict=True):
        grid = level.unflatten(1, size)
        found.append((grid >= F.max_pool3d(grid, 3, stride=1, padding=1)).flatten(1))
    return torch.cat(found, 1)


def best_tokens(scores: Tensor, num_queries: int, padding: Tensor | None) -> Tensor:
    """The tokens of highest score of each image, best first.

    Args:
        scores: [N, S], -inf for a token that must not be chosen.
        num_queries: Q, how many; all where there are fewer.
        padding: bool [N, S], True for the tokens of -inf; None where there are none.

    Returns:
        int64 [N, Q]; an image with fewer tokens outside the padding than Q repeats its last one.
    """
    count = min(num_queries, scores.shape[1])
    chosen = scores.topk(count, 1).indices
    if padding is None:
        return chosen
    last = (~padding).sum(1, keepdim=True) - 1
    rank = torch.arange(count, device=chosen.device)
    return chosen.gather(1, torch.minimum(rank, last).clamp(min=0))


def class_head(channels: int, num_classes: int) -> nn.Linear:
    """Class logits, which start at a probability of 0.01: few queries are objects (Lin et al. 2017, sec. 4.1)."""
    head = nn.Linear(channels, num_classes)
    nn.init.constant_(head.bias, math.log(PRIOR / (1 - PRIOR)))
    return head


def box_head(channels: int) -> MLP:
    """Deltas of a box; they start at zero, so that the first predicted box is the reference itself."""
    head = MLP(in_channels=channels, hidden=channels, out_channels=6, num_layers=3)
    for parameter in head.layers[-1].parameters():
        nn.init.zeros_(parameter)
    return head


def refine_boxes(deltas: Tensor, boxes: Tensor) -> Tensor:
    """Boxes [..., 6] moved by deltas [..., 6], a shift in extents and the log of the extents' ratio; float32.

    As `decode_boxes`, but the box moved is at least a voxel in extent, as every instance is, and shrinks by a factor of
    62.5 at most: extents stay positive whatever the deltas are.
    """
    lower, upper = boxes.float().split(3, -1)
    shift, growth = deltas.float().split(3, -1)
    extent = (upper - lower).clamp(min=1)
    centre = (lower + upper) / 2 + shift * extent
    half = growth.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() * extent / 2
    return torch.cat([centre - half, centre + half], -1)


@torch.no_grad()
def mask_boxes(mask_embeds: Tensor, mask_features: Tensor, mask_stride: Axes, boxes: Tensor) -> Tensor:
    """Tight boxes of the queries' masks (Mask DINO, sec. 3.4), a few queries at a time; no gradient.

    Only the part of a mask around the query's predicted box counts. In a volume full of objects that look alike, a mask
    takes long to learn which of them it is of, and the tight box of the whole mask would be the whole volume till then.

    Args:
        mask_embeds: [N, Q, Cm].
        mask_features: [N, Cm, D1, H1, W1].
        mask_stride: (z, y, x) stride of the mask features, voxels.
        boxes: [N, Q, 6] predicted boxes, voxels.

    Returns:
        float32 [N, Q, 6], voxels: around the cells whose mask logit is positive and whose centre lies in the predicted
        box with its extent doubled, each cell a stride in extent; the predicted box itself where there is no such cell.
    """
    images, _, *size = mask_features.shape
    features = torch.cat([mask_features.flatten(2), _axis_indicators(size, mask_features).expand(images, -1, -1)], 1)
    few = max(1, CHUNK // max(1, images * features.shape[2]))
    found = []
    for embeds, kept in zip(mask_embeds.to(features.dtype).split(few, 1), boxes.float().split(few, 1), strict=True):
        # What lies outside takes part in the product: added to the logits, it would be one more pass over all cells.
        outside = [_outside(kept, axis, size[axis], mask_stride[axis]).to(embeds.dtype) for axis in range(3)]
        logits = (torch.cat([embeds, *outside], 2) @ features).unflatten(2, size)
        side, plane = logits.amax(3), logits.amax(2)  # never over x first, the runs of memory
        highest = (side.amax(3), plane.amax(3), plane.amax(2))
        lower, upper = zip(*(_run(values > 0) for values in highest), strict=True)
        corners = [cell * s for cell, s in zip((*lower, *upper), (*mask_stride, *mask_stride), strict=True)]
        found.append(torch.where((highest[0].amax(2) > 0)[..., None], torch.stack(corners, -1).float(), kept))
    return torch.cat(found, 1)


def _axis_indicators(size: Sequence[int], like: Tensor) -> Tensor:
    """[d + h + w, d * h * w]: for each index of an axis, 1 in the cells that have it."""
    indices = torch.meshgrid(*(torch.arange(n, device=like.device) for n in size), indexing="ij")
    rows = [
        index.flatten() == torch.arange(n, device=like.device)[:, None] for index, n in zip(indices, size, strict=True)
    ]
    return torch.cat(rows).to(like.dtype)


def _outside(boxes: Tensor, axis: int, cells: int, stride: int) -> Tensor:
    """[N, q, cells] of an axis: 0 for centres of cells within boxes [N, q, 6] of twice the extent, else OUTSIDE."""
    lower, upper = boxes[..., axis, None], boxes[..., axis + 3, None]
    centre = (torch.arange(cells, device=boxes.device) + 0.5) * stride
    distance = (centre - (lower + upper) / 2).abs()
    return torch.where(distance < upper - lower, 0.0, OUTSIDE)


def _run(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """First occupied cell of each row of bool [N, q, n], and the one after its last."""
    cell = torch.arange(occupied.shape[2], device=occupied.device)
    first = torch.where(occupied, cell, occupied.shape[2]).amin(2)
    return first, torch.where(occupied, cell + 1, 0).amax(2)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """values [N, S, C] at index [N, Q] -> [N, Q, C]."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))
