"""Decoder of Mask DINO (Li et al. 2023) in 3D: memory and mask features -> classes, boxes and mask embeddings.

Query selection -> boxes of the selected queries' masks -> layers of self-attention, deformable attention around the
box, and feed-forward, each of which refines the box; in training also denoising queries. Boxes are voxels of the crop
and a refinement is relative to the box, so that the decoder answers the same in a block of another size. Must not know
losses.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from seg3d_monai.decoders.denoising import Denoising, DenoisingQueries
from seg3d_monai.decoders.query_selection import (
    QuerySelection,
    SelectedTokens,
    box_head,
    class_head,
    mask_boxes,
    refine_boxes,
)
from seg3d_monai.layers import (
    MLP,
    DeformableAttention3d,
    FeedForward,
    LayerNorm,
    PixelDecoderOutput,
    PlaceEmbedding,
    SelfAttention,
    pool_to_levels,
    sine_positions,
)

Axes = tuple[int, int, int]


class Prediction(NamedTuple):
    """What queries say: float32 class logits [N, Q, K], mask embeddings [N, Q, Cm], boxes [N, Q, 6] in voxels."""

    class_logits: Tensor
    mask_embeds: Tensor
    boxes: Tensor

    def of(self, queries: slice) -> "Prediction":
        """That of some of the queries."""
        return Prediction(*(values[:, queries] for values in self))


class MaskDINOLayer(nn.Module):
    """Self-attention, deformable attention to the memory, feed-forward, each with its sum and norm.

    Args:
        channels: channels of queries and memory.
        num_levels: levels of the memory.
        num_heads: heads of both attentions.
        num_points: places that a head reads in a level.
        feedforward: inner channels of the feed-forward part.
    """

    def __init__(self, *, channels: int, num_levels: int, num_heads: int, num_points: int, feedforward: int) -> None:
        super().__init__()
        self.self_attention = SelfAttention(channels=channels, num_heads=num_heads)
        self.cross_attention = DeformableAttention3d(
            channels=channels, num_levels=num_levels, num_heads=num_heads, num_points=num_points
        )
        self.norm = LayerNorm(channels)
        self.feed_forward = FeedForward(channels=channels, hidden=feedforward)

    def forward(
        self,
        content: Tensor,
        positions: Tensor,
        boxes: Tensor,
        memory: Tensor,
        sizes: Sequence[Axes],
        strides: Sequence[Axes],
        padding: Tensor | None,
        forbidden: Tensor | None = None,
    ) -> Tensor:
        """Content [N, Q, C], positions [N, Q, C], boxes [N, Q, 6] in voxels -> content [N, Q, C].

        Memory [N, S, C], the sizes and strides of its levels, and padding bool [N, S] as DeformableAttention3d takes
        them. `forbidden`, bool [N, Q, Q], is True where a query must not see another.
        """
        content = self.self_attention(content, positions, forbidden)
        read = self.cross_attention(content + positions, boxes, memory, sizes, strides, padding)
        refined: Tensor = self.feed_forward(self.norm(content + read))
        return refined


class PredictionHeads(nn.Module):
    """Class logits, mask embeddings and box deltas of queries; the same weights after every layer.

    Args:
        channels: channels of the queries.
        mask_channels: channels of the mask features.
        num_classes: K foreground classes.
    """

    def __init__(self, *, channels: int, mask_channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = LayerNorm(channels)
        self.class_logits = class_head(channels, num_classes)
        self.mask_embeds = MLP(in_channels=channels, hidden=channels, out_channels=mask_channels, num_layers=3)
        self.places = PlaceEmbedding(channels=channels)
        self.box_deltas = box_head(channels)

    def masks(self, normed: Tensor, boxes: Tensor) -> Tensor:
        """Normed queries [N, Q, C] and boxes [N, Q, 6], whose centres the masks lie around -> float32 embeddings."""
        boxes = boxes.detach()
        places = self.places(normed, (boxes[..., :3] + boxes[..., 3:]) / 2)
        return torch.cat([self.mask_embeds(normed).float(), places.float()], -1)

    def forward(self, states: Sequence[tuple[Tensor, Tensor]]) -> list[Prediction]:
        """Predictions of normed queries [N, Q, C] with their boxes [N, Q, 6]; Q may differ, all go through at once."""
        counts = [normed.shape[1] for normed, _ in states]
        normed, boxes = (torch.cat(parts, 1) for parts in zip(*states, strict=True))
        parts = (self.class_logits(normed).float(), self.masks(normed, boxes), boxes)
        return [Prediction(*values) for values in zip(*(part.split(counts, 1) for part in parts), strict=True)]


class MaskDINODecoder(nn.Module):
    """Mask DINO's decoder.

    Args:
        channels: channels of the memory and of the queries; a multiple of `num_heads`, at least 4.
        mask_channels: channels of the mask features that come from the image.
        num_classes: K foreground classes.
        num_queries: Q queries; with fewer memory tokens, as many as there are tokens.
        num_layers: decoder layers.
        num_heads: heads of the attentions.
        num_points: places that a head reads in a level.
        feedforward: inner channels of the feed-forward parts.
        num_levels: levels of the memory.
        content_queries: "selected", the content of a query is its memory token, as in Mask DINO; "learned", it is a
            parameter, as in DINO, and the token gives the box alone. Only selected content knows the image before the
            first layer: it makes the prediction "initial".
        box_from_mask: whether the first boxes are those of the selected tokens' masks; else the predicted ones are.
        anchor_cells: extent of a token's base box, in cells of its level.
        denoising: makes denoising queries in training; None for none.

    Raises:
        ValueError: another `content_queries`.
    """

    def __init__(
        self,
        *,
        channels: int,
        mask_channels: int,
        num_classes: int,
        num_queries: int = 300,
        num_layers: int = 9,
        num_heads: int = 8,
        num_points: int = 4,
        feedforward: int = 2048,
        num_levels: int,
        content_queries: Literal["learned", "selected"] = "learned",
        box_from_mask: bool = True,
        anchor_cells: float = 4.0,
        denoising: Denoising | None = None,
    ) -> None:
        super().__init__()
        if content_queries not in ("learned", "selected"):
            raise ValueError(f"content_queries is {content_queries!r}; choose 'learned' or 'selected'")
        self.box_from_mask = box_from_mask
        self.denoising = denoising
        self.selection = QuerySelection(
            channels=channels, num_classes=num_classes, num_queries=num_queries, anchor_cells=anchor_cells
        )
        self.content = nn.Embedding(num_queries, channels) if content_queries == "learned" else None
        self.label_embedding = None if denoising is None else nn.Embedding(num_classes, channels)
        self.position = MLP(in_channels=3 * channels, hidden=channels, out_channels=channels, num_layers=2)
        self.layers = nn.ModuleList(
            MaskDINOLayer(
                channels=channels,
                num_levels=num_levels,
                num_heads=num_heads,
                num_points=num_points,
                feedforward=feedforward,
            )
            for _ in range(num_layers)
        )
        self.heads = PredictionHeads(channels=channels, mask_channels=mask_channels, num_classes=num_classes)

    def extra_repr(self) -> str:
        """The settings that no weight tells, for `repr`."""
        return f"box_from_mask={self.box_from_mask}, denoising={self.denoising}"

    def forward(
        self, decoded: PixelDecoderOutput, targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> dict[str, Any]:
        """Predictions of the encoder, of the first queries and of every layer.

        Args:
            decoded: memory and mask features of N images.
            targets: for each image {"boxes" [G, 6], "classes" [G]}; read in training for denoising only.

        Returns:
            "names" of L predictions, "encoder", with selected content "initial", then "1", "2", ...; float32
            "class_logits" [L, N, Q, K], "mask_embeds" [L, N, Q, Cm], "boxes" [L, N, Q, 6] in voxels;
            "mask_features", "mask_stride" as they came in; "tokens", see `SelectedTokens.scored`. In training with
            denoising and an instance in the batch also "denoising": the same three [num_layers, N, T, ...] of the
            denoising queries after every layer, and "target_index" int64 [N, T], the true instance, -1 for a negative
            query, -2 for padding.

        Raises:
            ValueError: training mode with denoising, but without targets.
        """
        selected, first_boxes = self.selection(decoded)
        boxes = first_boxes.detach()
        embeds = self.heads.masks(self.heads.norm(selected.tokens), boxes)
        if self.box_from_mask:
            # In cells of the memory, not of the mask features, which are eight times as many: layers refine the boxes.
            (pooled,) = pool_to_levels(decoded.mask_features, [decoded.mask_stride, decoded.strides[0]])
            boxes = mask_boxes(embeds, pooled, decoded.strides[0], boxes)
        content = self._first_content(selected)
        names, states = ["encoder"], []
        if self.content is None:
            names.append("initial")
            states.append((self.heads.norm(content), boxes))
        noised = self._denoising_queries(content, targets)
        if noised is None:
            predictions = self.heads(states + self._refine(self._tie(content), boxes, decoded))
        else:
            content = torch.cat([content, noised.content], 1)
            boxes = torch.cat([boxes, noised.boxes], 1)
            predictions = self.heads(states + self._refine(content, boxes, decoded, noised.attention_mask))
        queries = first_boxes.shape[1]
        first = Prediction(selected.class_logits, embeds, first_boxes)
        outputs = _stack([first, *(p.of(slice(None, queries)) for p in predictions)])
        if noised is not None:
            outputs["denoising"] = _stack([p.of(slice(queries, None)) for p in predictions[len(states) :]])
            outputs["denoising"]["target_index"] = noised.target_index
        outputs["tokens"] = selected.scored
        outputs["names"] = names + [str(i + 1) for i in range(len(self.layers))]
        outputs["mask_features"] = decoded.mask_features
        outputs["mask_stride"] = decoded.mask_stride
        return outputs

    def _refine(
        self, content: Tensor, boxes: Tensor, decoded: PixelDecoderOutput, forbidden: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """The normed queries and their boxes after every layer."""
        memory = (decoded.flat_memory, decoded.sizes, decoded.strides, decoded.flat_padding)
        states = []
        for layer in self.layers:
            references = boxes.detach()
            lower, upper = references.split(3, -1)
            coordinates = torch.cat([(lower + upper) / 2, upper - lower], -1)
            positions = self.position(sine_positions(coordinates, 3 * content.shape[2]).to(content.dtype))
            content = layer(content, positions, references, *memory, forbidden)
            normed = self.heads.norm(content)
            # DINO looks forward twice: a layer's box also trains the layer before, through the box that it refines.
            refined, boxes = refine_boxes(self.heads.box_deltas(normed), torch.stack([boxes, references]))
            states.append((normed, refined))
        return states

    def _first_content(self, selected: SelectedTokens) -> Tensor:
        if self.content is None:
            return selected.tokens.detach()
        images, queries, _ = selected.tokens.shape
        learned: Tensor = self.content(torch.arange(queries, device=selected.tokens.device))
        return learned.expand(images, -1, -1)

    def _denoising_queries(
        self, content: Tensor, targets: Sequence[Mapping[str, Tensor]] | None
    ) -> DenoisingQueries | None:
        if self.denoising is None or self.label_embedding is None or not self.training:
            return None
        if targets is None:
            raise ValueError("targets is None in training mode; pass one dict for each image, or call eval() first")
        return self.denoising(targets, self.label_embedding, content.shape[1])

    def _tie(self, content: Tensor) -> Tensor:
        """The same content; in training the label embedding takes part in it, so that it always has a gradient."""
        if self.label_embedding is None or not self.training:
            return content
        unused = self.label_embedding(torch.zeros(1, dtype=torch.int64, device=content.device))
        return content + 0 * unused


def _stack(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Predictions, one after the other, as one tensor for each kind."""
    return {name: torch.stack([getattr(p, name) for p in predictions]) for name in Prediction._fields}
