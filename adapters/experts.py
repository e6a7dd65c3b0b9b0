"""Mixtures of experts as fusions: gated by the item's domain, or by its modality and its own tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genrec.adapters.fused import Fused, Given, Sizes, mean_vectors


class DomainMaps(nn.Module):
    """A linear map per domain and modality (UniM2Rec: arXiv:2311.01831, UniEmbedding): the domain is the gate.

    A map is learned as its difference from the identity: all domains start with one map.
    """

    def __init__(self, sizes: Sizes):
        super().__init__()
        many, width = len(sizes.modalities), sizes.width
        self.differences = nn.Parameter(torch.zeros(many, sizes.n_domains, width, width))

    def forward(self, tokens: dict[str, Tensor], present: dict[str, Tensor], given: Given) -> Fused:
        """tokens[m] [B, T_m, W] -> content [B, W]."""
        vectors = mean_vectors(tokens, present)
        mapped = [
            of + torch.einsum("bw,bwv->bv", of, maps[given.domain])
            for of, maps in zip(vectors.values(), self.differences, strict=True)
        ]
        return Fused(torch.stack(mapped).sum(0))


class ModalityExperts(nn.Module):
    """Experts of each modality, then experts of all together; gates read category and content (M3SRec, CIKM 2023).

    The gates are soft: every expert runs.
    """

    def __init__(self, sizes: Sizes, experts: int = 4):
        super().__init__()
        width = sizes.width
        self.category = nn.Embedding(sizes.n_categories, width)
        self.scale = nn.Linear(width, len(sizes.modalities))  # specific: which modality speaks for this item
        self.gate = nn.Linear(2 * width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(experts)
        )

    def forward(self, tokens: dict[str, Tensor], present: dict[str, Tensor], given: Given) -> Fused:
        """tokens[m] [B, T_m, W] -> content [B, W]."""
        vectors = torch.stack(list(mean_vectors(tokens, present).values()), 1)  # [B, M, W]
        kind = self.category(given.category)
        there = torch.stack(list(present.values()), 1)
        speaks = self.scale(kind).masked_fill(~there, torch.finfo(kind.dtype).min).softmax(1)
        mixed = (speaks[..., None] * vectors).sum(1)
        gates = self.gate(torch.cat([mixed, kind], 1)).softmax(1)  # [B, E]
        said = torch.stack([expert(mixed) for expert in self.experts], 1)
        return Fused(mixed + (gates[..., None] * said).sum(1))
