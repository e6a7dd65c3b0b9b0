"""Causal self-attention over item vectors (SASRec's network), for the rival of that name and the sequence part.

Histories are right-aligned, so the newest event always has the same, well-trained position. With item features an
item's vector is its id's plus a learned linear map of the features, at the input and in the output layer alike::

    history [4, 7, 2], max_history 3   inputs [4, 7] -> targets [7, 2], ages [1, 0]
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genrec.adapters.catalogue_loss import catalogue_loss
from genrec.adapters.histories import Histories

PAD = -1
ROWS = 16  # histories padded together


class Block(nn.Module):
    """Self-attention and a two-layer feed-forward part, each normalised before, dropped out and added after.

    There is no dropout inside either part: on a CPU its random draws cost as much as the arithmetic.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_ffn = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """One block: x float32 [B, T, W], mask bool [B, 1, T, T] (True: may look) -> float32 [B, T, W]."""
        # [B, T, 3W] -> three of [B, heads, T, W / heads]
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, mask)
        x = x + self.drop(self.out(mixed.transpose(1, 2).flatten(2)))
        return x + self.drop(self.ffn(self.norm_ffn(x)))


class Network(nn.Module):
    """Item and age embeddings, causal blocks, and the item vectors again as the output layer."""

    def __init__(
        self,
        n_items: int,
        max_history: int,
        width: int,
        layers: int,
        heads: int,
        dropout: float,
        features: Tensor | None = None,
    ) -> None:
        """features: float32 [N, F] or None; rows of about length 1."""
        super().__init__()
        self.items = nn.Embedding(n_items, width)
        self.ages = nn.Embedding(max_history, width)
        self.register_buffer("features", features, persistent=False)
        self.content = None if features is None else nn.Linear(features.shape[1], width, bias=False)
        for table in (self.items, self.ages):
            nn.init.normal_(table.weight, std=width**-0.5)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def table(self) -> Tensor:
        """Item vectors, float32 [N, W]."""
        return self.items.weight if self.content is None else self.items.weight + self.content(self.features)

    def forward(self, inputs: Tensor, table: Tensor) -> Tensor:
        """States after each event: inputs int64 [B, T], left-padded with PAD; `table` as above -> [B, T, W]."""
        length = inputs.shape[1]
        real = inputs != PAD
        ages = torch.arange(length - 1, -1, -1, device=inputs.device)
        x = self.dropout(F.embedding(inputs.clamp(min=0), table) + self.ages(ages))
        causal = torch.ones(length, length, dtype=torch.bool, device=inputs.device).tril()
        # a pad sees itself, or its softmax would be over nothing; nobody sees a pad
        mask = (causal & real[:, None, :]) | torch.eye(length, dtype=torch.bool, device=inputs.device)
        for block in self.blocks:
            x = block(x, mask[:, None])
        return self.norm(x)

    def loss(self, histories: list[np.ndarray]) -> Tensor:
        """Mean cross-entropy in nats of every event after a history's first one.

        Histories of like length are padded together, so that few places are computed for nothing.

        Args:
            histories: B of 2 to ``max_history + 1`` catalogue rows, oldest first.
        """
        table, states, targets = self.table(), [], []
        for rows in _alike(histories, table.device):
            part = [histories[row] for row in rows]
            wanted = left_pad([h[1:] for h in part]).to(table.device)
            real = wanted != PAD
            states.append(self(left_pad([h[:-1] for h in part]).to(table.device), table)[real])  # [events, W]
            targets.append(wanted[real])
        return catalogue_loss(torch.cat(states), table, torch.cat(targets))

    def logits(self, histories: Histories) -> Tensor:
        """Of every item after B histories' newest events, float32 [B, N]; all 0 for an empty history."""
        table, longest = self.table(), self.ages.num_embeddings
        states = table.new_zeros(len(histories), table.shape[1])
        for rows in _alike(histories, table.device):
            inputs = left_pad([np.asarray(histories[row][-longest:]) for row in rows]).to(table.device)
            states[rows] = self(inputs, table)[:, -1]
        return states @ table.T


def _alike(histories: Histories, device: torch.device) -> list[list[int]]:
    """The rows of all histories but empty ones, in parts of like length to be padded together."""
    ordered = sorted(
        (row for row, history in enumerate(histories) if len(history)), key=lambda row: len(histories[row])
    )
    at_once = ROWS if device.type == "cpu" else max(1, len(ordered))  # a GPU pays for each call, not for each place
    return [ordered[start : start + at_once] for start in range(0, len(ordered), at_once)]


def left_pad(histories: list[np.ndarray]) -> Tensor:
    """Right-align histories in one int64 tensor [B, longest], PAD on the left."""
    padded = np.full((len(histories), max((len(h) for h in histories), default=0)), PAD, dtype=np.int64)
    for row, history in zip(padded, histories, strict=True):
        if len(history):
            row[-len(history) :] = history
    return torch.from_numpy(padded)
