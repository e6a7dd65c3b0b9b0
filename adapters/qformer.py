"""Q-Former adapter: K learned queries read an item's modality tokens (Li et al. 2023, BLIP-2; used by EASE)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.adapters.modalities import ModalityTokens, Scaled


class CrossAttention(nn.Module):
    """Queries attend to modality tokens; a missing token has no weight, and with none there the output is zero."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, tokens: Tensor, there: Tensor) -> Tensor:
        """queries [B, K, W], tokens [B, T, W], there bool [B, T] -> [B, K, W]."""
        split = lambda x: x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731  [B, H, *, W / H]
        k, v = self.kv(tokens).chunk(2, -1)
        anything = there.any(1)[:, None, None]
        visible = (there | ~there.any(1, keepdim=True))[:, None, None]  # softmax over nothing would be NaN
        mixed = F.scaled_dot_product_attention(split(self.q(queries)), split(k), split(v), attn_mask=visible)
        return self.out(mixed.transpose(1, 2).flatten(2)) * anything


class Block(nn.Module):
    """Cross-attention, self-attention among the queries where there is more than one, feed-forward; pre-norm."""

    def __init__(self, width: int, heads: int, n_queries: int):
        super().__init__()
        self.cross_norm = nn.LayerNorm(width)
        self.cross = CrossAttention(width, heads)
        self.self_norm = nn.LayerNorm(width) if n_queries > 1 else None
        self.self_attention = CrossAttention(width, heads) if n_queries > 1 else None
        self.ffn = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, queries: Tensor, tokens: Tensor, there: Tensor) -> Tensor:
        """queries [B, K, W] -> [B, K, W]."""
        queries = queries + self.cross(self.cross_norm(queries), tokens, there)
        if self.self_norm is not None and self.self_attention is not None:
            normed = self.self_norm(queries)
            everyone = torch.ones(queries.shape[:2], dtype=torch.bool, device=queries.device)
            queries = queries + self.self_attention(normed, normed, everyone)
        return queries + self.ffn(queries)


class QFormerAdapter(nn.Module):
    """K learned queries cross-attend to all modality tokens."""

    def __init__(
        self,
        dims: dict[str, int],
        soft_tokens: int,
        dim: int,
        *,
        rms: float,
        width: int = 128,
        layers: int = 1,
        heads: int = 4,
        dropout: float = 0.1,
    ):
        """
        Args:
            dims: modality -> D_m.
            soft_tokens: K.
            dim: D, the LLM's width.
            rms: root mean square of the LLM's input embedding.
            width: inner width.
            layers: blocks.
            heads: attention heads.
            dropout: on the features.
        """
        super().__init__()
        self.tokens = ModalityTokens(dims, width, dropout)
        self.queries = nn.Parameter(torch.randn(soft_tokens, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads, soft_tokens) for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim), Scaled(dim, rms))

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        """features[m] [B, T_m, D_m], present[m] bool [B] -> soft tokens [B, K, D]."""
        tokens, there = self.tokens(features, present)
        queries = self.queries.expand(len(tokens), -1, -1)
        for block in self.blocks:
            queries = block(queries, tokens, there)
        return self.head(queries)
