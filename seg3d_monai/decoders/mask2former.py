"""Decoder of Mask2Former (Cheng et al. 2022) in 3D: queries that look at the memory inside their own last masks only.

Must not know losses, matching or backbones.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from seg3d_monai.decoders.query_selection import SelectedTokens, TokenSelection
from seg3d_monai.layers import (
    MLP,
    PLACE_CHANNELS,
    CrossAttention,
    FeedForward,
    LayerNorm,
    PixelDecoderOutput,
    PlaceEmbedding,
    SelfAttention,
    level_positions,
    pool_to_levels,
    sine_positions,
)

Axes = tuple[int, int, int]


SHIFT_UNIT = 8.0
"""Voxels by which a query of shift 1 moves its mask's centre."""


class PredictionHead(nn.Module):
    """Class logits and mask embeddings of queries, the same after every layer.

    Args:
        channels: channels of the queries.
        mask_channels: channels of the mask features that come from the image.
        num_classes: foreground classes; one more logit, the last, says "no object".
        has_centres: whether queries know where they are: their masks then lie around there, or as near as they see fit.
    """

    def __init__(self, *, channels: int, mask_channels: int, num_classes: int, has_centres: bool) -> None:
        super().__init__()
        self.norm = LayerNorm(channels)
        self.class_logits = nn.Linear(channels, num_classes + 1)
        self.mask_embeds = MLP(in_channels=channels, hidden=channels, out_channels=mask_channels, num_layers=3)
        self.has_centres = has_centres
        if has_centres:
            self.places = PlaceEmbedding(channels=channels)
            self.shift = nn.Linear(channels, 3)
            nn.init.zeros_(self.shift.weight)
            nn.init.zeros_(self.shift.bias)
        else:
            self.free_places = nn.Linear(channels, PLACE_CHANNELS)

    def forward(self, queries: Tensor, centres: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Queries [N, Q, C] -> class logits [N, Q, K + 1] and mask embeddings [N, Q, Cm], float32 or better.

        `centres` are float32 [N, Q, 3], voxels.
        """
        x = self.norm(queries)
        logits, embeds = self.class_logits(x), self.mask_embeds(x)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        if centres is None:
            places = self.free_places(x)
        else:
            places = self.places(x, centres + SHIFT_UNIT * self.shift(x).to(dtype))
        return logits.to(dtype), torch.cat([embeds.to(dtype), places.to(dtype)], -1)


class Mask2FormerLayer(nn.Module):
    """Masked attention to one level of the memory, attention among the queries, feed-forward block.

    Args:
        channels: channels of queries and memory.
        num_heads: heads of both attentions.
        feedforward: channels inside the feed-forward block.
    """

    def __init__(self, *, channels: int, num_heads: int, feedforward: int) -> None:
        super().__init__()
        self.cross_attention = CrossAttention(channels=channels, num_heads=num_heads)
        self.self_attention = SelfAttention(channels=channels, num_heads=num_heads)
        self.feedforward = FeedForward(channels=channels, hidden=feedforward)

    def forward(
        self,
        queries: Tensor,
        positions: Tensor,
        memory: Tensor,
        memory_positions: Tensor,
        forbidden: Tensor,
        padding: Tensor | None,
    ) -> Tensor:
        """Queries and positions [N, Q, C], memory [N, S, C], its positions [S, C], forbidden [N, Q, S] -> [N, Q, C]."""
        queries = self.cross_attention(queries, positions, memory, memory_positions, forbidden, padding)
        queries = self.self_attention(queries, positions)
        out: Tensor = self.feedforward(queries)
        return out


class CellQueries(nn.Module):
    """Queries from the memory's most promising cells, as in two-stage detectors (Deformable DETR, Mask DINO).

    Args:
        channels: channels of memory and queries.
        mask_channels: channels of the mask features.
        num_classes: foreground classes.
        num_queries: queries; fewer where the memory has fewer cells.
    """

    def __init__(self, *, channels: int, mask_channels: int, num_classes: int, num_queries: int) -> None:
        super().__init__()
        self.selection = TokenSelection(channels=channels, num_classes=num_classes, num_queries=num_queries)
        self.head = PredictionHead(
            channels=channels, mask_channels=mask_channels, num_classes=num_classes, has_centres=True
        )
        self.positions = MLP(in_channels=channels, hidden=channels, out_channels=channels, num_layers=2)

    def forward(self, decoded: PixelDecoderOutput) -> tuple[SelectedTokens, Tensor, tuple[Tensor, Tensor]]:
        """Memory -> the chosen cells, their positions [N, Q, C] and their prediction."""
        selected = self.selection(decoded)
        tokens, centres = selected.tokens, selected.centres
        positions = self.positions(sine_positions(centres, tokens.shape[2]).to(tokens.dtype))
        return selected, positions, self.head(tokens, centres)


class Mask2FormerDecoder(nn.Module):
    """Queries -> classes and masks, after every layer.

    Args:
        channels: channels of memory and queries.
        mask_channels: channels of the mask features.
        num_classes: foreground classes; one more logit, the last, says "no object".
        num_queries: queries, the most instances of an image.
        num_layers: layers, >= 1; they visit the levels in turn, coarsest first.
        num_heads: heads of the attentions.
        feedforward: channels inside the feed-forward blocks.
        num_levels: levels of the memory.
        query_source: "learned": the same queries for every image, as published; "selected": from the image's own most
            promising cells of the memory, which know where they are.

    Raises:
        ValueError: another query source, or less than one query or layer.
    """

    def __init__(
        self,
        *,
        channels: int,
        mask_channels: int,
        num_classes: int,
        num_queries: int = 100,
        num_layers: int = 9,
        num_heads: int = 8,
        feedforward: int = 2048,
        num_levels: int = 3,
        query_source: Literal["learned", "selected"] = "learned",
    ) -> None:
        super().__init__()
        if query_source not in ("learned", "selected"):
            raise ValueError(f"query_source is {query_source!r}; choose 'learned' or 'selected'")
        for argument, number in (("num_queries", num_queries), ("num_layers", num_layers)):
            if number < 1:
                raise ValueError(f"{argument} is {number}; give at least 1")
        self.num_queries = num_queries
        self.num_levels = num_levels
        self.query_source = query_source
        if query_source == "selected":
            self.selection = CellQueries(
                channels=channels, mask_channels=mask_channels, num_classes=num_classes, num_queries=num_queries
            )
        else:
            self.content = nn.Parameter(torch.randn(num_queries, channels))
            self.positions = nn.Parameter(torch.randn(num_queries, channels))
        self.level_embeddings = nn.Parameter(torch.randn(num_levels, channels))
        self.layers = nn.ModuleList(
            Mask2FormerLayer(channels=channels, num_heads=num_heads, feedforward=feedforward) for _ in range(num_layers)
        )
        self.head = PredictionHead(
            channels=channels,
            mask_channels=mask_channels,
            num_classes=num_classes,
            has_centres=query_source == "selected",
        )

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return f"{self.num_queries}, num_levels={self.num_levels}, query_source={self.query_source!r}"

    def forward(
        self, decoded: PixelDecoderOutput, targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> dict[str, Any]:
        """Decode.

        Args:
            decoded: memory of `num_levels` levels and mask features.
            targets: not read; here so that decoders are called alike.

        Returns:
            {"names": of the L predictions, in order: "encoder" (where queries are selected), "initial", "1", "2", ...;
            "class_logits" float32 [L, N, Q, K + 1], the last of them "no object"; "mask_embeds" float32 [L, N, Q, Cm];
            "mask_features" [N, Cm, D1, H1, W1]; "mask_stride"; "tokens", where queries are selected, see
            `SelectedTokens.scored`}. The mask logit of a query at a place is the product of its mask embedding and the
            mask features there.

        Raises:
            ValueError: another number of levels than `num_levels`.
        """
        if len(decoded.memory) != self.num_levels:
            raise ValueError(f"the memory has {len(decoded.memory)} levels; build the decoder with num_levels of them")
        names, predictions, centres, scored = ["initial"], [], None, {}
        if self.query_source == "selected":
            selected, positions, prediction = self.selection(decoded)
            # As in Mask DINO, what the decoder learns does not disturb the cells' own prediction.
            queries, centres = selected.tokens.detach(), selected.centres
            scored["tokens"] = selected.scored
            names.insert(0, "encoder")
            predictions.append(prediction)
        else:
            images = decoded.mask_features.shape[0]
            queries, positions = (x.expand(images, -1, -1) for x in (self.content, self.positions))
        predictions.append(self.head(queries, centres))
        levels = self._levels(decoded)
        for number, layer in enumerate(self.layers, start=1):
            memory, memory_positions, mask_cells, padding = levels[-1 - (number - 1) % self.num_levels]
            forbidden = _outside_masks(predictions[-1][1], mask_cells)
            queries = layer(queries, positions, memory, memory_positions, forbidden, padding)
            predictions.append(self.head(queries, centres))
            names.append(str(number))
        class_logits, mask_embeds = zip(*predictions, strict=True)
        return {
            "names": names,
            "class_logits": torch.stack(class_logits),
            "mask_embeds": torch.stack(mask_embeds),
            "mask_features": decoded.mask_features,
            "mask_stride": decoded.mask_stride,
            **scored,
        }

    def _levels(self, decoded: PixelDecoderOutput) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """Of each level, finest first: memory [N, S, C], its positions [S, C], mask features and padding [N, S]."""
        pooled = pool_to_levels(decoded.mask_features, [decoded.mask_stride, *decoded.strides])
        levels = []
        for i, (size, stride) in enumerate(zip(decoded.sizes, decoded.strides, strict=True)):
            memory = decoded.memory[i].flatten(2).transpose(1, 2)
            memory = memory + self.level_embeddings[i].to(memory.dtype)
            positions = level_positions(size, stride, memory.shape[-1], memory.device).to(memory.dtype)
            padding = None if decoded.padding is None else decoded.padding[i].flatten(1)
            levels.append((memory, positions, pooled[i].flatten(2), padding))
        return levels


@torch.no_grad()
def _outside_masks(mask_embeds: Tensor, mask_cells: Tensor) -> Tensor:
    """Whether cells [N, Cm, S] lie outside the masks of queries [N, Q, Cm], at a probability of one half: [N, Q, S]."""
    return mask_embeds @ mask_cells < 0
