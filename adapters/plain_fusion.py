"""Fusions without a mechanism of their own: sum, concatenation with an MLP, a transformer's summary token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genrec.adapters.fused import Fused, Given, Sizes, mean_vectors, token_rows


class SumFusion(nn.Module):
    """The sum of the modalities' vectors, as they are."""

    def __init__(self, sizes: Sizes):
        super().__init__()

    def forward(self, tokens: dict[str, Tensor], present: dict[str, Tensor], given: Given) -> Fused:
        """tokens[m] [B, T_m, W] -> content [B, W]."""
        return Fused(torch.stack(list(mean_vectors(tokens, present).values())).sum(0))


class ConcatMlp(nn.Module):
    """The modalities' vectors side by side, through a layer with a residual sum."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.width
        self.mlp = nn.Sequential(
            nn.Linear(len(sizes.modalities) * width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: dict[str, Tensor], present: dict[str, Tensor], given: Given) -> Fused:
        """tokens[m] [B, T_m, W] -> content [B, W]."""
        vectors = list(mean_vectors(tokens, present).values())
        return Fused(torch.stack(vectors).sum(0) + self.mlp(torch.cat(vectors, 1)))


class SummaryToken(nn.Module):
    """One transformer layer over all tokens and a learned one, whose state is the item (ItemSage: arXiv:2205.11728)."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.summary = nn.Parameter(torch.randn(sizes.width) * 0.02)
        self.layer = nn.TransformerEncoderLayer(
            sizes.width, 2, 2 * sizes.width, dropout=0.0, batch_first=True, norm_first=True
        )

    def forward(self, tokens: dict[str, Tensor], present: dict[str, Tensor], given: Given) -> Fused:
        """tokens[m] [B, T_m, W] -> content [B, W]."""
        rows, there = token_rows(tokens, present)
        rows = torch.cat([self.summary.expand(len(rows), 1, -1), rows], 1)
        unseen = torch.cat([there.new_zeros(len(rows), 1), ~there], 1)
        return Fused(self.layer(rows, src_key_padding_mask=unseen)[:, 0])
