"""What fusions take and return."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Given:
    """What is known of items beside their modalities.

    Attributes:
        category: int64 [B].
        domain: int64 [B].
        ids: float [B, W], the learned ones; zeros where the system has none.
    """

    category: Tensor
    domain: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Sizes:
    """What a system's parts are made for: its width W, the data's modalities, categories and domains."""

    width: int
    modalities: tuple[str, ...]
    n_categories: int
    n_domains: int


@dataclass(frozen=True)
class Fused:
    """A fusion's answer.

    Attributes:
        content: [B, W].
        parts: named vectors [B, W] that objectives look at.
        modal: modality -> [B, W] in place of the mean of its tokens; None: that.
    """

    content: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    modal: dict[str, Tensor] | None = None


def mean_vectors(tokens: dict[str, Tensor], present: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each modality's mean token, zeros where it is missing: tokens[m] [B, T_m, W] -> [B, W]."""
    return {m: of.mean(1) * present[m][:, None] for m, of in tokens.items()}


def token_rows(tokens: dict[str, Tensor], present: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """All modalities' tokens side by side, [B, T, W], and which are there, bool [B, T]."""
    there = [present[m][:, None].expand(-1, of.shape[1]) for m, of in tokens.items()]
    return torch.cat(list(tokens.values()), 1), torch.cat(there, 1)
