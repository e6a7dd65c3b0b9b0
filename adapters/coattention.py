"""Co-attention: the tokens of every modality look at those of all others before they are pooled (ViLBERT, MM-Rec)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genrec.adapters.fused import Fused, Given, Sizes, token_rows
from genrec.adapters.qformer import CrossAttention


class CoAttention(nn.Module):
    """A joint encoder: one pre-norm block of attention over all tokens and a feed-forward part, then the mean.

    It reads items with some tokens masked as well as whole ones, so it can be trained to predict what was masked.
    """

    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.width
        self.marks = nn.Parameter(torch.randn(len(sizes.modalities), width) * 0.02)
        self.norm, self.attend = nn.LayerNorm(width), CrossAttention(width, 2)
        self.ffn = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: dict[str, Tensor], present: dict[str, Tensor], given: Given) -> Fused:
        """tokens[m] [B, T_m, W] -> content [B, W]; parts: each modality's pooled state."""
        marked = {m: of + mark for (m, of), mark in zip(tokens.items(), self.marks, strict=True)}
        rows, there = token_rows(marked, present)
        normed = self.norm(rows)
        rows = rows + self.attend(normed, normed, there)
        rows = (rows + self.ffn(rows)) * there[..., None]
        return Fused(rows.sum(1) / there.sum(1, keepdim=True).clamp(min=1))
