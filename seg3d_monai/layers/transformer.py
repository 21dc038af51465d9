"""Transformer blocks: norm after the sum (Vaswani et al. 2017), positions added to queries and keys only (DETR).

Masks are True where attention is forbidden. A query for which every key is forbidden attends to all of them
(Cheng et al., Mask2Former, 2022): its softmax would be undefined otherwise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seg3d_monai.layers.norm import LayerNorm


class Attention(nn.Module):
    """Multi-head attention on torch's fused kernels.

    Args:
        channels: channels of queries, keys and values.
        num_heads: heads; `channels` is a multiple of them.

    Raises:
        ValueError: `channels` is no multiple of `num_heads`.
    """

    def __init__(self, *, channels: int, num_heads: int) -> None:
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"channels {channels} is no multiple of num_heads {num_heads}; change one of them")
        self.num_heads = num_heads
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        for layer in (self.query, self.key, self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        forbidden: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            queries: [N, Q, C].
            keys: [N, S, C].
            values: [N, S, C].
            forbidden: bool [Q, S] or [N, Q, S], True where a query must not read a key.
            padding: bool [N, S], True for keys that no query of the image may read.

        Returns:
            [N, Q, C].
        """
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, queries), (self.key, keys), (self.value, values))
        )
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=_allowed(forbidden, padding))
        out: Tensor = self.output(read.transpose(1, 2).flatten(2))
        return out


def _allowed(forbidden: Tensor | None, padding: Tensor | None) -> Tensor | None:
    """Mask as `scaled_dot_product_attention` takes it, True = allowed, one for all heads [N or 1, 1, Q or 1, S]."""
    if padding is not None:
        # An image without any valid key has no right answer, but must not give NaN.
        padding = (padding & ~padding.all(1, keepdim=True))[:, None]
    if forbidden is None:
        return None if padding is None else ~padding[:, None]
    if forbidden.dim() == 2:
        forbidden = forbidden[None]
    closed = forbidden if padding is None else forbidden | padding
    allowed = ~closed | closed.all(-1, keepdim=True)
    return (allowed if padding is None else allowed & ~padding)[:, None]


class SelfAttention(nn.Module):
    """Queries attend to each other; sum, then norm.

    Args:
        channels: channels of the queries.
        num_heads: heads of the attention.
    """

    def __init__(self, *, channels: int, num_heads: int = 8) -> None:
        super().__init__()
        self.attention = Attention(channels=channels, num_heads=num_heads)
        self.norm = LayerNorm(channels)

    def forward(self, queries: Tensor, positions: Tensor, forbidden: Tensor | None = None) -> Tensor:
        """Queries [N, Q, C], positions [N, Q, C], forbidden bool [Q, Q] or [N, Q, Q] -> [N, Q, C]."""
        placed = queries + positions
        out: Tensor = self.norm(queries + self.attention(placed, placed, queries, forbidden))
        return out


class CrossAttention(nn.Module):
    """Queries attend to a memory; sum, then norm.

    Args:
        channels: channels of queries and memory.
        num_heads: heads of the attention.
    """

    def __init__(self, *, channels: int, num_heads: int = 8) -> None:
        super().__init__()
        self.attention = Attention(channels=channels, num_heads=num_heads)
        self.norm = LayerNorm(channels)

    def forward(
        self,
        queries: Tensor,
        positions: Tensor,
        memory: Tensor,
        memory_positions: Tensor,
        forbidden: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Attend to a memory.

        Args:
            queries: [N, Q, C].
            positions: [N, Q, C], of the queries.
            memory: [N, S, C].
            memory_positions: [N, S, C] or [S, C].
            forbidden: bool [N, Q, S] or [Q, S], True where a query must not read.
            padding: bool [N, S], True for cells that no query of the image may read.

        Returns:
            [N, Q, C].
        """
        read = self.attention(queries + positions, memory + memory_positions, memory, forbidden, padding)
        out: Tensor = self.norm(queries + read)
        return out


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between them; sum, then norm.

    Args:
        channels: channels of the tokens.
        hidden: channels between the layers.
    """

    def __init__(self, *, channels: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, hidden)
        self.reduce = nn.Linear(hidden, channels)
        self.norm = LayerNorm(channels)
        for layer in (self.expand, self.reduce):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        out: Tensor = self.norm(x + self.reduce(torch.relu(self.expand(x))))
        return out
