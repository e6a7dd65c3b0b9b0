"""A few soft tokens per item, which are its content side by side: what a frozen LLM can be made to read (EASE)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genrec.adapters.fused import Fused, Given, Sizes, token_rows
from genrec.adapters.qformer import Block
from genrec.errors import ConfigError

SOFT_TOKENS = 4


class SoftQueries(nn.Module):
    """Learned queries read an item's modality tokens (Q-Former); content is their answers, W / 4 values each.

    So what is exported is all that the LLM was given: nothing else of the adapter has to be kept.
    """

    def __init__(self, sizes: Sizes):
        """Raises ConfigError where the width is no multiple of SOFT_TOKENS."""
        super().__init__()
        if sizes.width % SOFT_TOKENS:
            raise ConfigError(
                f"item.width: {sizes.width} cannot hold {SOFT_TOKENS} soft tokens of one width; "
                f"take a multiple of {SOFT_TOKENS}"
            )
        self.queries = nn.Parameter(torch.randn(SOFT_TOKENS, sizes.width))
        self.block = Block(sizes.width, 2, SOFT_TOKENS)
        self.last = nn.Sequential(nn.LayerNorm(sizes.width), nn.Linear(sizes.width, sizes.width // SOFT_TOKENS))

    def forward(self, tokens: dict[str, Tensor], present: dict[str, Tensor], given: Given) -> Fused:
        """tokens[m] [B, T_m, W] -> content [B, W]: soft tokens [B, 4, W / 4], side by side."""
        rows, there = token_rows(tokens, present)
        answers = self.block(self.queries.expand(len(rows), -1, -1), rows, there)
        return Fused(self.last(answers).flatten(1))
